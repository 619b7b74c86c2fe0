"""nGPT for TensorRT-LLM's PyTorch flow (1.3 and later), over its attention and its parallel linears.

The weights are read from a Hugging Face folder:

    trtllm-serve DIR --custom_module_dirs export/trtllm/custom/ngpt_trtllm [--tp_size N]

Pinned to the API of release candidates of 1.3, read in NVIDIA/TensorRT-LLM: tensorrt_llm/_torch/modules/attention.py
(commit 00547a25), linear.py (00bbf71e), embedding.py (fbbc05dd), models/modeling_utils.py (stored without a commit:
the file that defines `register_external_model_modules`); later commits move the attention module to _torch/attention
(8a67c3c1). Contract-tested against tests/doubles/trtllm_torch; not executed on TensorRT-LLM. Quantised checkpoints
are refused.

Scales fold on loading as for every engine here (`ngpt.weights`); q and k are encoded, normed and scaled before the
attention backend, which encodes no positions; norms over E follow the all-reduce inside the row-parallel linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from export.weights import DeployedWeights, branch_scale, position_diagonal, rope_tables
from ngpt.checkpoint import Checkpoint, TensorInfo
from ngpt.config_keys import DEFAULTS
from ngpt.errors import MissingPackageError, UnsupportedError
from ngpt.spec import NGPTSpec
from ngpt.tensor_names import Name
from ngpt.weights import Weights

try:
    from tensorrt_llm._torch.models.modeling_utils import (
        DecoderModel,
        DecoderModelForCausalLM,
        register_auto_model,
    )
    from tensorrt_llm._torch.modules.attention import Attention
    from tensorrt_llm._torch.modules.decoder_layer import DecoderLayer
    from tensorrt_llm._torch.modules.embedding import Embedding
    from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode
except ImportError as error:
    raise MissingPackageError(
        "this file is for TensorRT-LLM's PyTorch flow",
        expected="tensorrt-llm 1.3",
        found=str(error),
        remedy="use NVIDIA's TensorRT-LLM container",
    ) from error

from transformers import AutoConfig, PretrainedConfig

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


_ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def runtime_config(base: Any) -> Any:
    """A configuration class of transformers 4, with config.json's keys as they stand; `base` is its PretrainedConfig."""

    class NGPTRuntimeConfig(base):  # type: ignore[misc]
        model_type = "ngpt"

        def __init__(self, **keys: Any) -> None:
            # The position code has several spellings: what the file does not state must not be filled in beside what it does.
            unstated = {key for key in _ROPE if keys.get(key) is None}
            own = {key: keys.pop(key, default) for key, default in DEFAULTS.items()}
            common = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
            super().__init__(**{key: own[key] for key in common}, **keys)
            for key in own.keys() - unstated - set(common):
                setattr(self, key, own[key])
            self.num_key_value_heads = own["num_key_value_heads"] or own["num_attention_heads"]
            self.head_dim = own["head_dim"] or own["hidden_size"] // own["num_attention_heads"]

    NGPTRuntimeConfig.__qualname__ = "NGPTRuntimeConfig"
    return NGPTRuntimeConfig


try:
    AutoConfig.for_model("ngpt")  # with transformers 5, `ngpt` has registered its own class
except ValueError:
    NGPTRuntimeConfig = runtime_config(PretrainedConfig)  # under its own name, so that it can be pickled
    AutoConfig.register("ngpt", NGPTRuntimeConfig)


PLACES = {
    "embed": "model.embed_tokens",
    "attn.q": "self_attn.qkv_proj",
    "attn.k": "self_attn.qkv_proj",
    "attn.v": "self_attn.qkv_proj",
    "attn.q_scale": "self_attn.q_scale",
    "attn.o": "self_attn.o_proj",
    "attn.lr": "attn_lr",
    "mlp.up": "mlp.up_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.lr": "mlp_lr",
    "head": "lm_head",
}
"""Canonical part -> module or parameter that takes it, of a layer or of the whole model; parts of one module are one product."""


def config_dict(config: Any) -> dict[str, Any]:
    """The keys of config.json that shape the network, from either configuration class."""
    return {"model_type": "ngpt"} | {key: getattr(config, key) for key in DEFAULTS if hasattr(config, key)}


def l2norm(x: torch.Tensor, eps: float = 0.0) -> torch.Tensor:
    """x / (||x|| + eps) over the last axis of float32 x; a zero row gives zeros."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    unit: torch.Tensor = x / (length + eps if eps else length.clamp_min(torch.finfo(torch.float32).tiny))
    return unit


def hypersphere_update(h: torch.Tensor, x: torch.Tensor, rate: torch.Tensor, eps: float) -> torch.Tensor:
    """norm(h + rate * (norm(x, eps) - h)) in float32, in the dtype of h; h and x [num_tokens, E], rate float32 [E]."""
    wide = h.float()
    return l2norm(wide + rate * (l2norm(x.float(), eps) - wide)).to(h.dtype)


class NGPTAttention(Attention):
    """TensorRT-LLM's attention with `apply_rope`, its hook before the backend, replaced: code, l2 norm, sqk**2 on q."""

    def __init__(self, model_config: Any, spec: NGPTSpec, layer_idx: int) -> None:
        super().__init__(
            hidden_size=spec.hidden_size,
            num_attention_heads=spec.num_heads,
            num_key_value_heads=spec.num_kv_heads,
            max_position_embeddings=spec.max_length,
            bias=spec.attention_bias,
            pos_embd_params=None,
            rope_fusion=False,
            layer_idx=layer_idx,
            dtype=model_config.pretrained_config.torch_dtype,
            config=model_config,
            # softmax(q k^T / (sqrt(D) * q_scaling)): nGPT multiplies by sqrt(D).
            q_scaling=1.0 / spec.head_dim,
            head_dim=spec.head_dim,
        )
        self.spec = spec
        self.q_scale = nn.Parameter(torch.empty(self.q_size, dtype=torch.float32), requires_grad=False)
        if spec.position == "research":
            tables = {"diagonal": position_diagonal(spec)}
        else:
            tables = dict(zip(("cos", "sin"), rope_tables(spec), strict=True))
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table), persistent=False)

    def apply_rope(self, q: Any, k: Any, v: Any, position_ids: Any) -> tuple[Any, Any, Any]:
        """q [num_tokens, H * D] (or q, k and v in one) -> q and k ready for the dot product, in the dtype they came in."""
        q, k, v = self.split_qkv(q, k, v)
        positions, kind = position_ids.reshape(-1).long(), q.dtype
        q, k = (l2norm(self._encoded(x, positions)) for x in (q, k))
        q = q * self.q_scale.view(1, -1, self.head_dim)
        return q.flatten(1).to(kind), k.flatten(1).to(kind), v

    def _encoded(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, heads * D] to float32 [num_tokens, heads, D]."""
        x = x.float().view(len(x), -1, self.head_dim)
        if self.spec.position == "research":
            encoded: torch.Tensor = x * self.diagonal[positions][:, None]
            return encoded
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        half = self.spec.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class NGPTMLP(nn.Module):
    """down(f(up(h))), or down(up(h) * f(gate(h))) where the network is gated."""

    def __init__(self, model_config: Any, spec: NGPTSpec) -> None:
        super().__init__()
        self.kind = spec.mlp

        def linear(inputs: int, outputs: int, mode: Any) -> Any:
            return Linear(
                inputs,
                outputs,
                bias=spec.mlp_bias,
                dtype=model_config.pretrained_config.torch_dtype,
                mapping=model_config.mapping,
                tensor_parallel_mode=mode,
                quant_config=model_config.get_quant_config(),
                allreduce_strategy=model_config.allreduce_strategy,
            )

        self.up_proj = linear(spec.hidden_size, spec.intermediate_size, TensorParallelMode.COLUMN)
        self.gate_proj = linear(spec.hidden_size, spec.intermediate_size, TensorParallelMode.COLUMN) if spec.gated else None
        self.down_proj = linear(spec.intermediate_size, spec.hidden_size, TensorParallelMode.ROW)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[num_tokens, E] -> [num_tokens, E], whole on every rank."""
        u = self.up_proj(h)
        u = self._activation(u) if self.gate_proj is None else u * self._activation(self.gate_proj(h))
        out: torch.Tensor = self.down_proj(u)
        return out

    def _activation(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "relu2":
            return torch.relu(x).square()
        if self.kind in ("gelu", "gelu_tanh"):
            return nn.functional.gelu(x, approximate="tanh" if self.kind == "gelu_tanh" else "none")
        if self.kind not in ("relu", "silu"):
            raise UnsupportedError(
                "activation in TensorRT-LLM's PyTorch flow", expected="relu2, relu, silu, gelu, gelu_tanh", found=self.kind
            )
        return torch.relu(x) if self.kind == "relu" else nn.functional.silu(x)


class NGPTDecoderLayer(DecoderLayer):
    """h -> update by attention -> update by MLP."""

    def __init__(self, model_config: Any, spec: NGPTSpec, mlp_eps: float, layer_idx: int) -> None:
        super().__init__()
        self.mlp_eps = mlp_eps
        self.self_attn = NGPTAttention(model_config, spec, layer_idx)
        self.mlp = NGPTMLP(model_config, spec)
        for name in ("attn_lr", "mlp_lr"):
            rate = nn.Parameter(torch.empty(spec.hidden_size, dtype=torch.float32), requires_grad=False)
            self.register_parameter(name, rate)

    def forward(
        self, position_ids: Any, hidden_states: torch.Tensor, attn_metadata: Any, residual: Any = ..., **kwargs: Any
    ) -> torch.Tensor:
        """The hidden state is all there is to pass on: `residual` is never given."""
        x = self.self_attn(position_ids=position_ids, hidden_states=hidden_states, attn_metadata=attn_metadata, **kwargs)
        h = hypersphere_update(hidden_states, x, self.attn_lr, 0.0)
        return hypersphere_update(h, self.mlp(h), self.mlp_lr, self.mlp_eps)


class NGPTModel(DecoderModel):
    """Embedding and layers; there is no final norm."""

    def __init__(self, model_config: Any, spec: NGPTSpec, mlp_eps: float) -> None:
        super().__init__(model_config)
        self.embed_tokens = Embedding(
            spec.vocab_size,
            spec.hidden_size,
            dtype=model_config.pretrained_config.torch_dtype,
            mapping=model_config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
        )
        self.layers = nn.ModuleList([NGPTDecoderLayer(model_config, spec, mlp_eps, i) for i in range(spec.num_layers)])

    def forward(
        self, attn_metadata: Any, input_ids: Any = None, position_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """Hidden states [num_tokens, E]; one of input_ids and inputs_embeds is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("lora_params"):
            raise UnsupportedError(
                "LoRA adapters of nGPT in TensorRT-LLM's PyTorch flow",
                expected="no lora_params",
                found="some",
                remedy="merge the adapter into the checkpoint first",
            )
        h: torch.Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            h = layer(position_ids=position_ids, hidden_states=h, attn_metadata=attn_metadata)
        return h


@register_auto_model("NGPTForCausalLM")
class NGPTForCausalLM(DecoderModelForCausalLM):
    """`config.architectures[0]` of a checkpoint names this class."""

    def __init__(self, model_config: Any) -> None:
        config = model_config.pretrained_config
        if getattr(model_config.quant_config, "quant_algo", None) is not None:
            raise UnsupportedError(
                "quantised nGPT in TensorRT-LLM's PyTorch flow",
                expected="no quant_algo",
                found=str(model_config.quant_config.quant_algo),
                remedy="use the engine flow of TensorRT-LLM 1.2",
            )
        if getattr(model_config.mapping, "enable_attention_dp", False):
            # Each rank would hold every head, and the slice of q_scale that is a rank's own would be another's.
            raise UnsupportedError(
                "attention data parallelism of nGPT in TensorRT-LLM's PyTorch flow",
                expected="enable_attention_dp false",
                found="true",
                remedy="leave it out, and divide the model by tensor_parallel_size alone",
            )
        keys = config_dict(config)
        spec = NGPTSpec.from_config(keys)
        # The base class would share the embedding table with the head, whose rows carry sz here.
        config.tie_word_embeddings = False
        arithmetic = str(config.torch_dtype).removeprefix("torch.")
        mlp_eps = spec.mlp_eps * branch_scale(spec, arithmetic) ** 2  # as in DeployedWeights
        super().__init__(
            NGPTModel(model_config, spec, mlp_eps), config=model_config, hidden_size=spec.hidden_size, vocab_size=spec.vocab_size
        )
        self._keys, self._arithmetic = keys, arithmetic

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Fold and load a Hugging Face checkpoint's tensors, those of this rank's stage. Raises the checkpoint's errors."""
        with Checkpoint(Path(str(getattr(self.config, "_name_or_path", ""))), self._keys, _Tensors(weights)) as checkpoint:
            self._load(DeployedWeights(Weights(checkpoint), arithmetic=self._arithmetic))

    def _load(self, source: DeployedWeights) -> None:
        """Give every module its parts of the canonical tensors, one module's in memory at a time.

        Raises UnsupportedError for a tensor without a place.
        """
        mapping, spec = self.model_config.mapping, source.spec
        modules: dict[tuple[int | None, str], dict[str, list[str]]] = {}  # (layer, module) -> part -> names, in order
        for name in source.names():
            layer, part, _ = Name.of(name)
            if part not in PLACES:
                raise UnsupportedError(
                    f"the tensor {part} in TensorRT-LLM's PyTorch flow", expected=", ".join(PLACES), found=part
                )
            modules.setdefault((layer, PLACES[part]), {}).setdefault(part, []).append(name)
        mine = {"embed": mapping.is_first_pp_rank(), "head": mapping.is_last_pp_rank()}
        layers = mapping.pp_layers(spec.num_layers)
        for (layer, path), parts in modules.items():
            if not all(mine.get(part, layer in layers) for part in parts):
                continue
            module: Any = self if layer is None else self.model.layers[layer]
            for attribute in path.split("."):
                module = getattr(module, attribute)
            tensors = [
                {Name.of(name).kind or "weight": self._part(part, torch.from_numpy(source.get(name)), spec) for name in names}
                for part, names in parts.items()
            ]
            if isinstance(module, nn.Parameter):
                module.data.copy_(tensors[0]["weight"])
            else:
                module.load_weights(weights=tensors)

    def _part(self, part: str, tensor: torch.Tensor, spec: NGPTSpec) -> torch.Tensor:
        """What `load_weights` is handed: TensorRT-LLM's modules divide by rank themselves, parameters of our own do not."""
        mapping = self.model_config.mapping
        if part in ("attn.k", "attn.v"):
            return _repeated(tensor, spec.num_kv_heads, mapping.tp_size)
        if part == "attn.q_scale":
            return tensor.view(mapping.tp_size, -1)[mapping.tp_rank]
        return tensor


def _repeated(rows: torch.Tensor, heads: int, tp: int) -> torch.Tensor:
    """Rows [heads * D, ...], each head as often as there are ranks to hold it.

    Not TensorRT-LLM's `duplicate_kv_weight`, which repeats the single entries of a bias instead of its heads.
    """
    return rows.view(heads, -1, *rows.shape[1:]).repeat_interleave(max(1, tp // heads), 0).flatten(0, 1)


class _Tensors:
    """A checkpoint's source over the mapping that TensorRT-LLM's loader hands out: tensors or lazy slices of them."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self._weights = weights
        self.infos = {name: _info(value) for name, value in weights.items()}
        self.files: tuple[Path, ...] = ()
        self.places: dict[str, Path] = {}

    def get(self, name: str) -> torch.Tensor:
        """On the CPU, in its storage dtype."""
        tensor: torch.Tensor = self._weights[name][:]
        return tensor.cpu()

    def close(self) -> None:
        """Nothing to release: the loader owns the tensors."""


def _info(value: Any) -> TensorInfo:
    if hasattr(value, "get_shape"):  # safetensors' lazy slice
        return TensorInfo(str(value.get_dtype()), tuple(value.get_shape()))
    return TensorInfo(_DTYPES.get(value.dtype, str(value.dtype)), tuple(value.shape))
