"""TEST DOUBLE of tensorrt_llm/models/modeling_utils.py (anish-shanbhag/TensorRT-LLM, commit 34a26727) and of the inputs that
tensorrt_llm/models/generation_mixin.py (commit 03ec464e) declares: which exist on which stage, their names, types and shapes.
"""

import fnmatch
import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from tests.doubles.tensorrt_llm_double import layers
from tests.doubles.tensorrt_llm_double.tensor import Tensor
from tests.doubles.tensorrt_llm_double.world import QuantMode, default_net

MODEL_MAP = {}
EXCLUDED = ["*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate"]


class PretrainedConfig:
    def __init__(
        self, *, architecture, dtype, hidden_size, num_hidden_layers, num_attention_heads, vocab_size=None, hidden_act="gelu",
        logits_dtype="float32", norm_epsilon=1e-5, position_embedding_type="learned_absolute", max_position_embeddings=None,
        rotary_embedding_dim=None, num_key_value_heads=None, intermediate_size=None, mapping=None, quantization=None,
        use_parallel_embedding=False, embedding_sharding_dim=0, head_size=None, **kwargs,
    ):  # fmt: skip
        assert not kwargs, f"unknown keys would become attributes with a warning: {sorted(kwargs)}"
        names = dict(locals())
        for name in set(names) - {"self", "kwargs", "mapping", "__class__"}:
            setattr(self, name, names[name])
        self.mapping = layers.Mapping(**mapping)
        self.quant_algo = quantization["quant_algo"]
        assert set(quantization) <= {"quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"}
        fp8_cache, fp8 = (quantization[name] == "FP8" for name in ("kv_cache_quant_algo", "quant_algo"))
        self.quant_mode = (QuantMode.FP8_KV_CACHE if fp8_cache else QuantMode(0)) | (QuantMode.FP8_QDQ if fp8 else QuantMode(0))
        self.kv_dtype = "fp8" if self.quant_mode.has_fp8_kv_cache() else dtype

    @classmethod
    def from_dict(cls, config):
        config_cls = getattr(MODEL_MAP[config["architecture"]], "config_class", cls)
        return config_cls(**config)

    @classmethod
    def from_json_file(cls, config_file):
        return cls.from_dict(json.loads(Path(config_file).read_text()))

    def set_rank(self, rank):
        self.mapping.rank = rank


class _PostInit(type):
    def __call__(cls, *args, **kwargs):
        made = type.__call__(cls, *args, **kwargs)
        made.__post_init__()
        return made


class PretrainedModel(layers.Module, metaclass=_PostInit):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def __post_init__(self):
        _quantize(self, self.config.quant_algo)

    @classmethod
    def from_checkpoint(cls, ckpt_dir, rank=None, config=None):
        config = config or PretrainedConfig.from_json_file(Path(ckpt_dir) / "config.json")
        if rank is not None:
            config.set_rank(rank)
        weights = load_file(Path(ckpt_dir) / f"rank{config.mapping.rank}.safetensors")
        model = cls(config)
        model.load(_preprocess(weights, config.quant_algo))
        return model

    def load(self, weights):
        named = dict(self.named_parameters())
        assert named.keys() <= weights.keys(), f"Required but not provided tensors: {named.keys() - weights.keys()}"
        assert weights.keys() <= named.keys(), f"Provided but not required tensors: {weights.keys() - named.keys()}"
        for name, parameter in named.items():
            parameter.value = weights[name]

    def prepare_inputs(self, max_batch_size, max_input_len, max_seq_len, max_num_tokens, use_cache, gather_context_logits=False):
        net, config, mapping = default_net(), self.config, self.config.mapping
        packed = net.plugin_config.remove_input_padding
        tokens, batch = [1, 1, max_num_tokens], [1, 1, max_batch_size]
        length = [1, 1, max_input_len]

        def tensor(name, dtype, shape, *ranges):
            names = [f"{name}.{i}" for i in range(len(shape))]
            return Tensor(
                name=name, dtype=dtype, shape=shape, dim_range=OrderedDict((n, [r]) for n, r in zip(names, ranges, strict=True))
            )  # noqa: E501

        by_token = ([-1], [tokens]) if packed else ([-1, -1], [batch, length])
        first = mapping.is_first_pp_rank()
        ids = tensor("input_ids", "int32", by_token[0], *by_token[1]) if first else None
        positions = tensor("position_ids", "int32", by_token[0], *by_token[1]) if first else None
        width = config.hidden_size
        hidden = None if first else tensor("hidden_states_input", config.dtype, [*by_token[0], width], *by_token[1], width)
        wanted = mapping.is_last_pp_rank() and not gather_context_logits
        last = tensor("last_token_ids", "int32", [-1], batch) if wanted else None

        def rows(name, dtype="int32"):
            return tensor(name, dtype, [-1], batch)

        def plain(name, dtype, shape):
            return Tensor(name=name, dtype=dtype, shape=shape)

        cache = {"past_key_value": None}
        offsets = ("kv_cache_block_offsets", "host_kv_cache_block_offsets")
        pools = {"host_kv_cache_pool_pointers": ("int64", [-1, 2]), "host_kv_cache_pool_mapping": ("int32", [-1, 2])}
        if net.plugin_config.paged_kv_cache:
            cache |= {name: plain(name, "int32", [1, -1, 2, -1]) for name in offsets}
            cache |= {name: plain(name, *how) for name, how in pools.items()}
        else:
            cache |= dict.fromkeys((*offsets, *pools))
            heads = -(-config.num_key_value_heads // mapping.tp_size)
            shape = [-1, 2, heads, -1, config.head_size]
            numbers = mapping.pp_layers(config.num_hidden_layers)
            cache["past_key_value"] = [plain(f"past_key_value_{i}", config.kv_dtype, shape) for i in numbers]
        cache |= {
            "host_past_key_value_lengths": rows("host_past_key_value_lengths"),
            "host_max_attention_window_sizes": plain("host_max_attention_window_sizes", "int32", [-1]),
            "host_sink_token_length": plain("host_sink_token_length", "int32", [1]),
            "cache_indirection": plain("cache_indirection", "int32", [-1, 1, -1]),
        }
        attention = {
            "sequence_length": rows("sequence_length"), "context_lengths": rows("context_lengths"),
            "host_context_lengths": rows("host_context_lengths") if packed else None, "max_context_length": max_input_len,
            "host_request_types": rows("host_request_types"),
            "host_runtime_perf_knobs": plain("host_runtime_perf_knobs", "int64", [16]),
            "host_context_progress": plain("host_context_progress", "int64", [1]),
        }  # fmt: skip
        result = {
            "input_ids": ids, "position_ids": positions, "use_cache": use_cache, "last_token_ids": last, "attention_mask": None,
            "kv_cache_params": SimpleNamespace(**cache), "attention_params": SimpleNamespace(**attention),
        }  # fmt: skip
        if hidden is not None:
            result["hidden_states"] = hidden
        return result


def _quantize(model, algorithm):
    """`quantize_layers` (tensorrt_llm/quantization/quantize.py, commit 06148676): linears are replaced by their quantised kind."""
    bits = {"W8A16": 8, "W4A16": 4}.get(algorithm)
    assert algorithm in (None, "W8A16", "W4A16", "FP8"), algorithm
    for name, module, parent in list(model.named_modules_with_parent()):
        kind = next((k for k in (layers.Linear, layers.RowLinear) if type(module) is k), None)
        if algorithm is None or kind is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in EXCLUDED):
            continue
        row = kind is layers.RowLinear
        arguments = {
            "in_features": module.in_features * (module.tp_size if row else 1),
            "out_features": module.out_features * (1 if row else module.tp_size),
            "bias": module.bias is not None, "dtype": module.dtype, "tp_group": module.tp_group, "tp_size": module.tp_size,
        }  # fmt: skip
        if not row:
            arguments["gather_output"] = module.gather_output
        if bits is None:
            made = (layers.FP8RowLinear if row else layers.FP8Linear)(**arguments)
        else:
            made = (layers.WeightOnlyQuantRowLinear if row else layers.WeightOnlyQuantLinear)(bits, **arguments)
        setattr(parent, name.rsplit(".", 1)[-1], made)


def _preprocess(weights, algorithm):
    """`preprocess_weights` (`process_kv_scaling_factor`: the reciprocal of a cache's scale) -> `weight_only_quantize_dict`
    (models/convert_utils.py, commit 03961722), with codes left in order."""
    bits = {"W8A16": 8, "W4A16": 4}.get(algorithm)
    for name in list(weights):
        if name.endswith(".kv_cache_scaling_factor"):
            weights[name.replace("kv_cache_scaling", "kv_cache_rcp_scaling")] = torch.reciprocal(weights[name])
        if bits and any(part in name for part in ("qkv.weight", "dense.weight", "fc.weight", "proj.weight", "gate.weight")):
            codes, scale = layers.weight_only_codes(weights[name], bits)
            weights[name], weights[name.replace(".weight", ".per_channel_scale")] = codes, scale
        if algorithm == "FP8" and name.endswith("weight") and weights[name].dtype == torch.int8:
            weights[name] = weights[name].view(torch.float8_e4m3fn)
    return weights
