"""The explicit table from a spec to the tensors a Hugging Face nGPT checkpoint must hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ngpt.spec import NGPTSpec

LM_HEAD = "lm_head.weight"
EMBED = "model.embed_tokens.weight"
SZ = "sz.weight"

# Storage dtypes read without loss into the float64 in which scales are folded. The names are safetensors'.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Expected:
    """What a tensor must look like. ``unit_axis`` is the axis along which vectors have norm 1, if any."""

    shape: tuple[int, ...]
    unit_axis: int | None = None
    required: bool = True
    zero_vectors: bool = True  # an exactly zero row or column (a pruned unit) does no harm


def expected_tensors(spec: NGPTSpec) -> dict[str, Expected]:
    """Name to `Expected` for every tensor, in the order of the forward pass. ``lm_head`` is optional iff tied."""
    e, v = spec.hidden_size, spec.vocab_size
    # A zero embedding row would be divided by its own norm: there is no direction to take.
    table = {EMBED: Expected((v, e), unit_axis=1, zero_vectors=False)}
    for layer in range(spec.num_layers):
        table.update(_layer(spec, f"model.layers.{layer}."))
    if spec.sz_folded:  # the rows' norms are the scales: any finite value is possible
        table[LM_HEAD] = Expected((v, e))
    else:
        table[LM_HEAD] = Expected((v, e), unit_axis=1, required=not spec.tied)
        table[SZ] = Expected((v, 1))
    return table


def _layer(spec: NGPTSpec, prefix: str) -> Iterator[tuple[str, Expected]]:
    e, f, d = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * d, spec.num_kv_heads * d
    yield from _linear(prefix + "self_attn.q_proj", q, e, 1, spec.attention_bias)
    yield from _linear(prefix + "self_attn.k_proj", kv, e, 1, spec.attention_bias)
    yield from _linear(prefix + "self_attn.v_proj", kv, e, 1, spec.attention_bias)
    yield prefix + "self_attn.sqk.weight", Expected((q, 1))
    yield from _linear(prefix + "self_attn.o_proj", e, q, 0, spec.attention_bias)
    yield prefix + "attn_alpha", Expected((e,))
    yield from _linear(prefix + "mlp.up_proj", f, e, 1, spec.mlp_bias)
    if spec.gated:
        yield from _linear(prefix + "mlp.gate_proj", f, e, 1, spec.mlp_bias)
    yield prefix + "mlp.suv.weight", Expected((2 * f if spec.gated else f, 1))
    yield from _linear(prefix + "mlp.down_proj", e, f, 0, spec.mlp_bias)
    yield prefix + "mlp_alpha", Expected((e,))


def _linear(name: str, rows: int, columns: int, unit_axis: int, bias: bool) -> Iterator[tuple[str, Expected]]:
    yield name + ".weight", Expected((rows, columns), unit_axis=unit_axis)
    if bias:
        yield name + ".bias", Expected((rows,))
