"""`NGPTForCausalLM` for TensorRT-LLM 1.2's engine flow: modules that hold a rank's weights; forward states the network.

    trtllm-build --checkpoint_dir DIR --model_cls_file export/trtllm/model_file.py --model_cls_name NGPTForCausalLM ...

APIs read in NVIDIA/TensorRT-LLM: tensorrt_llm/module.py (commit 000a01de), layers/linear.py (03961722),
layers/embedding.py (0f02b7af), mapping.py (05ebebb2), models/generation_mixin.py (03ec464e), commands/build.py
(65f1d153), builder.py (008b2b8d); models/modeling_utils.py in a fork made while 1.2 was current
(anish-shanbhag/TensorRT-LLM, 34a26727). Contract-tested; not executed on TensorRT-LLM.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from export.network import define_network
from export.trtllm.config import ARCHITECTURE, spec_from
from export.trtllm.lowering import Inputs, TensorRTLLM, TensorRTLLMKernels
from ngpt.errors import MissingPackageError, UnsupportedError

try:
    from tensorrt_llm import functional
    from tensorrt_llm._common import default_net, default_trtnet
    from tensorrt_llm.layers import ColumnLinear, Embedding, RowLinear
    from tensorrt_llm.models import MODEL_MAP
    from tensorrt_llm.models.modeling_utils import PretrainedConfig, PretrainedModel
    from tensorrt_llm.module import Module, ModuleList
    from tensorrt_llm.parameter import Parameter
except ImportError as error:
    raise MissingPackageError(
        "this file is for trtllm-build",
        expected="tensorrt-llm 1.2",
        found=str(error),
        remedy="use NVIDIA's TensorRT-LLM container, or pip install 'tensorrt-llm>=1.2,<1.3' with NVIDIA's package index",
    ) from error


class NGPTConfig(PretrainedConfig):
    """TensorRT-LLM's configuration and one key more: `ngpt`, with the spec and the eps of the MLP's norm."""

    def __init__(self, *, ngpt: dict[str, Any], **common: Any) -> None:
        super().__init__(**common)
        self.ngpt = ngpt


class _Layer(Module):
    """Containers only: the lowering calls what they hold. Names are those TensorRT-LLM's quantisation looks for."""

    def __init__(self, config: NGPTConfig, spec: Any) -> None:
        super().__init__()
        mapping = config.mapping
        tp: dict[str, Any] = {"dtype": config.dtype, "tp_group": mapping.tp_group, "tp_size": mapping.tp_size}
        heads, hidden, inner = spec.num_heads * spec.head_dim, spec.hidden_size, spec.intermediate_size
        keys = max(1, spec.num_kv_heads // mapping.tp_size) * spec.head_dim * mapping.tp_size  # repeated where tp exceeds them

        def rows(size: int, bias: bool) -> Any:
            return ColumnLinear(hidden, size, bias=bias, gather_output=False, **tp)

        self.attention = Module()
        self.attention.qkv = rows(heads + 2 * keys, spec.attention_bias)
        self.attention.dense = RowLinear(heads, hidden, bias=spec.attention_bias, **tp)
        self.attention.q_scale = Parameter(shape=(heads // mapping.tp_size,), dtype="float32")
        if config.kv_dtype == "fp8":
            # Reading and writing. `kv_cache_quantize` (quantization/quantize.py, Ataraksia/TensorRT-LLM commit
            # a451bf93) gives them to TensorRT-LLM's own attention modules alone; `preprocess_weights` makes the
            # second from the first.
            self.attention.kv_cache_scaling_factor = Parameter(shape=(1,), dtype="float32")
            self.attention.kv_cache_rcp_scaling_factor = Parameter(shape=(1,), dtype="float32")
        self.attention.lr = Parameter(shape=(hidden,), dtype="float32")
        self.mlp = Module()
        self.mlp.fc = rows(inner, spec.mlp_bias)
        if spec.gated:
            self.mlp.gate = rows(inner, spec.mlp_bias)
        self.mlp.proj = RowLinear(inner, hidden, bias=spec.mlp_bias, **tp)
        self.mlp.lr = Parameter(shape=(hidden,), dtype="float32")


class NGPTForCausalLM(PretrainedModel):
    """One rank of the network."""

    config_class = NGPTConfig

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        self.spec, self.mlp_eps = spec_from(config.ngpt), config.ngpt["mlp_eps"]
        mapping, spec = config.mapping, self.spec
        tp: dict[str, Any] = {"dtype": config.dtype, "tp_group": mapping.tp_group, "tp_size": mapping.tp_size}
        self.transformer = Module()
        if mapping.is_first_pp_rank():
            # Divided by vocabulary rows, which ends with an all-reduce that adds zeros.
            self.transformer.vocab_embedding = Embedding(
                spec.vocab_size, spec.hidden_size, sharding_dim=0, tp_rank=mapping.tp_rank, **tp
            )
        self.transformer.layers = ModuleList([_Layer(config, spec) for _ in mapping.pp_layers(spec.num_layers)])
        if mapping.is_last_pp_rank():
            padded = -(-spec.vocab_size // mapping.tp_size) * mapping.tp_size
            self.lm_head = ColumnLinear(spec.hidden_size, padded, bias=False, gather_output=True, **tp)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """TensorRT-LLM's inputs, with positions on every stage.

        `prepare_basic_inputs` gives later stages none, because its own attention encodes positions itself. The C++ runtime sets
        `position_ids` on every rank all the same (cpp/tensorrt_llm/batch_manager/transformerBuffers.cpp, `getBuffers` and
        `copyPositionIds`, commit 0165bd7a), so an engine that has the input is served.
        """
        inputs: dict[str, Any] = super().prepare_inputs(*args, **kwargs)
        if inputs["position_ids"] is None:
            hidden = inputs["hidden_states"]
            packed = default_net().plugin_config.remove_input_padding
            names = ["position_ids_num_tokens_range"] if packed else ["batch_size_beam_width", "position_ids_inlen_range"]
            ranges = OrderedDict(
                (name, [[p.min[axis], p.opt[axis], p.max[axis]] for p in hidden.profiles]) for axis, name in enumerate(names)
            )
            inputs["position_ids"] = functional.Tensor(
                name="position_ids", dtype="int32", shape=[-1] * len(names), dim_range=ranges
            )
        return inputs

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        use_cache: bool = False,
        last_token_ids: Any = None,
        attention_mask: Any = None,
        kv_cache_params: Any = None,
        attention_params: Any = None,
        hidden_states: Any = None,
        **others: Any,
    ) -> Any:
        """State the network and mark its outputs: `logits` float32 on the last stage, else `hidden_states_output`."""
        if given := sorted(name for name, value in others.items() if value is not None):
            raise UnsupportedError(
                "inputs of NGPTForCausalLM", expected="no LoRA, prompt tuning or drafts", found=", ".join(given)
            )
        plugins = default_net().plugin_config
        if not plugins.gpt_attention_plugin:
            raise UnsupportedError("gpt_attention_plugin", expected="enabled", found="disabled")
        if plugins.use_fp8_context_fmha:
            raise UnsupportedError(
                "use_fp8_context_fmha",
                expected="disabled",
                found="enabled",
                remedy="disable it; with an fp8 cache and fp8 weights disable use_paged_context_fmha too, which turns it on",
            )
        inputs = Inputs(
            input_ids,
            position_ids,
            hidden_states,
            last_token_ids,
            use_cache,
            kv_cache_params,
            attention_params,
            packed=bool(plugins.remove_input_padding),
            paged=bool(plugins.paged_kv_cache),
        )
        kernels = self.config.ngpt.get("kernels")
        lowering = (
            TensorRTLLM(functional, self, inputs)
            if kernels is None
            else TensorRTLLMKernels(functional, self, inputs, default_trtnet(), kernels)
        )
        out = define_network(lowering)
        if self.config.mapping.is_last_pp_rank():
            out.mark_output("logits", self.config.logits_dtype)
        else:
            out.mark_output("hidden_states_output", self.config.dtype)
        if use_cache and not inputs.paged:
            for layer, present in zip(lowering.layers, lowering.presents, strict=True):
                present.mark_output(f"present_key_value_{layer}", self.config.kv_dtype)
        return out


# `PretrainedConfig.from_dict` looks the architecture up here, also when --model_cls_file names the class.
MODEL_MAP[ARCHITECTURE] = NGPTForCausalLM
