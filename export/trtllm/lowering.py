"""The network over `tensorrt_llm.functional`: what `trtllm-build` compiles, one rank and one stage at a time.

Read at: tensorrt_llm/functional.py, NVIDIA/TensorRT-LLM commit 00714966 (the stored commit nearest to tag v1.2.1; the
module went with the engine flow in 1.3). Contract-tested against tests/doubles/tensorrt_llm_double; not executed on
TensorRT-LLM.

Tokens are packed, [num_tokens, E] with the sequences one behind the other (in-flight batching), or padded, [B, S, E];
heads become one more axis. What a rank computes on its own: projections by rows, position code, norms per head,
sqk**2, attention over its heads. Norms over E need the whole vector: they come after the all-reduce that ends `dense`
and `proj` (inside `RowLinear`), never before it, and every rank then computes the same update. So a layer has two
all-reduces, as without normalisation. `gpt_attention` scales by 1 / (q_scaling * sqrt(D))
(docs/source/advanced/gpt-attention.md, commit 5a211b91): q_scaling = 1 / D is nGPT's sqrt(D). It encodes no positions
here, since sqk**2 belongs between the position code and the dot product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.lowerings.base import Lowering
from export.plugins import registration
from export.trtllm.layout import place_of
from export.weights import Array, position_diagonal, rope_tables
from ngpt.errors import UnsupportedError
from ngpt.tensor_names import Name

Tensor = Any
"""`tensorrt_llm.functional.Tensor`, which is not here to be named."""


@dataclass(frozen=True)
class Inputs:
    """What the runtime hands a rank: tensors int32 [num_tokens] or [B, S], and TensorRT-LLM's own parameter objects.

    `input_ids` exists on the first stage only, `hidden_states` ([num_tokens, E] or [B, S, E]) on the others; `last_token_ids`
    [B] names the rows whose logits are wanted, None for all.
    """

    input_ids: Tensor
    position_ids: Tensor
    hidden_states: Tensor
    last_token_ids: Tensor
    use_cache: bool
    cache: Any
    attention: Any
    packed: bool
    paged: bool


class TensorRTLLM(Lowering[Tensor]):
    """`model` is an `export.trtllm.model.NGPTForCausalLM`, whose modules hold the weights; `functional` is TensorRT-LLM's."""

    def __init__(self, functional: Any, model: Any, inputs: Inputs) -> None:
        # The base class takes weights to read; here they are already the modules' parameters.
        self.f, self.model, self.inputs = functional, model, inputs
        self.mapping, self.dtype = model.config.mapping, model.config.dtype
        whole = model.spec
        tp = self.mapping.tp_size
        # The network as this rank sees it: its own heads.
        self.spec = dataclasses.replace(whole, num_heads=whole.num_heads // tp, num_kv_heads=max(1, whole.num_kv_heads // tp))
        self.key_heads = whole.num_kv_heads
        self._stage: list[int] = self.mapping.pp_layers(whole.num_layers)
        self.presents: list[Tensor] = []
        self._leading = 1 if inputs.packed else 2
        self._shared: dict[str, Tensor] = {}
        self._products: dict[str, dict[str, Tensor]] = {}

    @property
    def layers(self) -> Sequence[int]:
        return self._stage

    @property
    def mlp_eps(self) -> float:
        eps: float = self.model.mlp_eps
        return eps

    # -- the ends of a stage -------------------------------------------------------------------------------------------

    def embedding(self, name: str) -> Tensor:
        if self.mapping.is_first_pp_rank():
            return self.tap(name, self.model.transformer.vocab_embedding(self.inputs.input_ids))
        return self.f.recv(self.inputs.hidden_states, self.mapping.prev_pp_rank())

    def linear(self, name: str, x: Tensor) -> Tensor:
        x = self._stored(x)
        if name.split(".")[-1] in ("q", "k", "v"):
            return self._part_of_one_product(name, x)
        if name != "head":
            return self._module(name)(x)
        if not self.mapping.is_last_pp_rank():
            return self.f.send(x, self.mapping.next_pp_rank())
        return self.model.lm_head(self.f.gather_last_token_logits(x, self.inputs.last_token_ids, self.inputs.packed))

    # -- the vocabulary ------------------------------------------------------------------------------------------------

    def split_heads(self, name: str, x: Tensor, heads: int) -> Tensor:
        """[..., heads, D]."""
        return self.f.view(x, [0] * self._leading + [heads, self.spec.head_dim])  # 0 keeps the input's size

    def position(self, name: str, x: Tensor) -> Tensor:
        """In float32."""
        x = self._wide(x)
        if self.spec.position == "research":
            return x * self._rows("research.diagonal", lambda: position_diagonal(self.spec))
        half, size = self.spec.rotary_dim // 2, self.spec.head_dim
        cos = self._rows("rope.cos", lambda: rope_tables(self.spec)[0])
        sin = self._rows("rope.sin", lambda: rope_tables(self.spec)[1])
        sizes = [half, half] + ([size - 2 * half] if size > 2 * half else [])
        a, b, *rest = self.f.split(x, sizes, dim=self._leading + 1)
        return self.f.concat([a * cos - b * sin, b * cos + a * sin, *rest], dim=self._leading + 1)

    def l2norm(self, name: str, x: Tensor, eps: float = 0.0) -> Tensor:
        """In float32."""
        x = self._wide(x)
        length = self.f.sqrt(self.f.sum(x * x, dim=x.ndim() - 1, keepdim=True))
        # A zero row gives zeros: dividing by the smallest normal number instead of by zero.
        guarded = length + eps if eps else self.f.maximum(length, float(np.finfo(np.float32).tiny))
        return x / guarded

    def vector(self, weight: str) -> Tensor:
        return self._module(weight).value

    def head_vector(self, weight: str, heads: int) -> Tensor:
        return self.f.view(self.vector(weight), [1] * self._leading + [heads, self.spec.head_dim])

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._alike(x, y)
        return x + y

    def sub(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._alike(x, y)
        return x - y

    def mul(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._alike(x, y)
        return x * y

    def activation(self, name: str, kind: str, x: Tensor) -> Tensor:
        if kind == "relu2":
            positive = self.f.relu(x)
            return positive * positive
        functions = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu"}  # its gelu is the tanh approximation
        if kind not in functions:
            raise UnsupportedError("activation in TensorRT-LLM", expected=", ".join(["relu2", *functions]), found=kind)
        return getattr(self.f, functions[kind])(x)

    def hypersphere_update(self, name: str, h: Tensor, x: Tensor, rate: str, eps: float) -> Tensor:
        # x is whole: `dense` and `proj` have ended with their all-reduce. Composed in float32; only the result is stored.
        return self.tap(name, self._stored(super().hypersphere_update(f"{name}.f32", self._wide(h), x, rate, eps)))

    def attention(self, name: str, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        cache, params, size = self.inputs.cache, self.inputs.attention, self.spec.head_dim
        local = layer - self.layers[0]  # TensorRT-LLM counts a stage's layers from 0
        heads = ((q, self.spec.num_heads), (k, self.spec.num_kv_heads), (v, self.spec.num_kv_heads))
        packed = [self.f.view(self._stored(x), [0] * self._leading + [count * size]) for x, count in heads]
        out, present = self.f.gpt_attention(
            qkv=self.f.concat(packed, dim=self._leading),
            past_key_value=None if self.inputs.paged or not self.inputs.use_cache else cache.past_key_value[local],
            sequence_length=params.sequence_length,
            host_past_key_value_lengths=cache.host_past_key_value_lengths,
            host_max_attention_window_sizes=cache.host_max_attention_window_sizes,
            host_sink_token_length=cache.host_sink_token_length,
            context_lengths=params.context_lengths,
            cache_indirection=cache.cache_indirection,
            host_request_types=params.host_request_types,
            layer_idx=local,
            num_heads=self.spec.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            num_kv_heads_origin=self.key_heads,
            hidden_size_per_head=size,
            q_scaling=1.0 / (scale * size**0.5),
            max_context_length=params.max_context_length,
            tp_size=self.mapping.tp_size,
            tp_rank=self.mapping.tp_rank,
            kv_cache_block_offsets=cache.kv_cache_block_offsets,
            host_kv_cache_block_offsets=cache.host_kv_cache_block_offsets,
            host_kv_cache_pool_pointers=cache.host_kv_cache_pool_pointers,
            host_kv_cache_pool_mapping=cache.host_kv_cache_pool_mapping,
            host_context_lengths=params.host_context_lengths,
            use_cache=self.inputs.use_cache,
            host_runtime_perf_knobs=params.host_runtime_perf_knobs,
            host_context_progress=params.host_context_progress,
            **self._quantised_cache(local),
        )
        self.presents.append(present)
        return out

    # -- helpers -------------------------------------------------------------------------------------------------------

    def tap(self, name: str, x: Tensor) -> Tensor:
        """`x`, named so that `trtllm-build --enable_debug_output` makes it an output of the engine."""
        self.model.register_network_output(name, x)
        return x

    def _module(self, name: str) -> Any:
        """The module or parameter of a canonical name: `layers.3.attn.o`, `layers.3.mlp.lr`."""
        layer, part, _ = Name.of(name)
        assert layer is not None  # the ends of a stage have no number
        found = self.model.transformer.layers[layer - self.layers[0]]
        for attribute in place_of(part).module.split("."):
            found = getattr(found, attribute)
        return found

    def _quantised_cache(self, local: int) -> dict[str, Any]:
        """Arguments of `gpt_attention` for an fp8 cache: both scales of a layer, float32 [1], and the mode; else none.

        As TensorRT-LLM's own attention passes them (tensorrt_llm/layers/attention.py, Ataraksia/TensorRT-LLM commit
        a451bf93, a fork of 1.x).
        """
        if self.model.config.kv_dtype != "fp8":
            return {}
        attention = self.model.transformer.layers[local].attention
        return {
            "kv_orig_quant_scale": attention.kv_cache_rcp_scaling_factor.value,
            "kv_quant_orig_scale": attention.kv_cache_scaling_factor.value,
            "kv_cache_quant_mode": self.model.config.quant_mode,
        }

    def _part_of_one_product(self, name: str, x: Tensor) -> Tensor:
        """q, k or v, which TensorRT-LLM has as one product: it stands in the network once."""
        layer, part = name.rsplit(".", 1)
        if layer not in self._products:
            query, key = self.spec.num_heads * self.spec.head_dim, self.spec.num_kv_heads * self.spec.head_dim
            parts = self.f.split(self._module(name)(x), [query, key, key], dim=self._leading)
            self._products[layer] = dict(zip("qkv", parts, strict=True))
        return self._products[layer].pop(part)

    def _wide(self, x: Tensor) -> Tensor:
        return self.f.cast(x, "float32")  # nothing where it is that type already

    def _stored(self, x: Tensor) -> Tensor:
        return self.f.cast(x, self.dtype)

    def _alike(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Where the types differ, both in float32."""
        return (x, y) if x.dtype == y.dtype else (self._wide(x), self._wide(y))

    def _rows(self, name: str, table: Callable[[], Array]) -> Tensor:
        """Rows of a float32 table [L, width] at each token's position, [..., 1, width]: the same for all layers."""
        if name not in self._shared:
            values: Array = np.ascontiguousarray(table())
            rows = self.f.embedding(self.inputs.position_ids, self.f.constant(values))
            self._shared[name] = self.f.view(rows, [0] * self._leading + [1, values.shape[1]])
        return self._shared[name]


class TensorRTLLMKernels(TensorRTLLM):
    """With this project's fused kernel for the hypersphere update, as a TensorRT plugin whose PTX the engine embeds.

    `architecture` is the compute capability in tens and units: 90 is 9.0. Call sites only: nobody has built an engine with them.
    """

    def __init__(self, functional: Any, model: Any, inputs: Inputs, network: Any, architecture: int) -> None:
        super().__init__(functional, model, inputs)
        self.network, self.architecture = network, architecture

    def hypersphere_update(self, name: str, h: Tensor, x: Tensor, rate: str, eps: float) -> Tensor:
        rates = self.vector(rate)
        out = registration.hypersphere_update(
            self.network, h.trt_tensor, x.trt_tensor, rates.trt_tensor, eps=eps, architecture=self.architecture
        )
        layer = self.network.get_layer(self.network.num_layers - 1)
        return self.tap(name, self.f._create_tensor(out, layer))
