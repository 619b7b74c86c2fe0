"""Layers that older TensorRT versions lack, composed of those they have: rotation, cache update, attention.

TensorRT 10.14 (the version TensorRT-LLM 1.2 builds with) has no cache-update layer, earlier ones no attention or rotary layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from export.lowerings.tensorrt.layers import TensorRTLayers
from export.lowerings.tensorrt.library import Tensor


def rotate(ops: TensorRTLayers, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half of x [B, N, S, D] by cos and sin [B, 1, S, R / 2]; channels from R on pass through."""
    half, size = ops.spec.rotary_dim // 2, ops.spec.head_dim
    x = ops.wide(f"{name}.wide", x)
    first, second = (ops.channels(f"{name}.{n}", x, start, half) for n, start in (("first", 0), ("second", half)))
    parts = [
        ops.sub(f"{name}.out_first", ops.mul(f"{name}.first_cos", first, cos), ops.mul(f"{name}.second_sin", second, sin)),
        ops.add(f"{name}.out_second", ops.mul(f"{name}.second_cos", second, cos), ops.mul(f"{name}.first_sin", first, sin)),
    ]
    if 2 * half < size:
        parts.append(ops.channels(f"{name}.rest", x, 2 * half, size - 2 * half))
    joined = ops.network.add_concatenation(parts)
    ops.made(name, joined).axis = 3
    return ops.out(name, joined)


def append(ops: TensorRTLayers, name: str, past: Tensor, new: Tensor, write_at: Tensor, input_ids: Tensor) -> Tensor:
    """past [B, K, L, D] with new [B, K, S, D] at write_at [B]: each place of the cache takes the new value or keeps its own."""
    inside, fresh = _places(ops, write_at, input_ids)
    gather = ops.network.add_gather(ops.reshape(f"{name}.by_token", new, None, (0, 2, 1, 3)), inside, 1)
    ops.made(f"{name}.spread", gather).num_elementwise_dims = 1
    spread = ops.reshape(f"{name}.spread_heads", ops.out(f"{name}.spread", gather), None, (0, 2, 1, 3))
    return ops.out(name, ops.network.add_select(fresh, spread, past))


def _places(ops: TensorRTLayers, write_at: Tensor, input_ids: Tensor) -> tuple[Any, Any]:
    """(which new token each place of the cache would take [B, L], whether it takes one [B, 1, L, 1]); the same for all layers."""
    if "cache.takes" not in ops.values:
        operations = ops.trt.ElementWiseOperation
        shape = ops.out("cache.shape", ops.network.add_shape(input_ids))
        tokens = ops.out("cache.tokens", ops.network.add_slice(shape, (1,), (1,), (1,)))
        count = ops.reshape("cache.count", ops.cast("cache.tokens32", tokens, ops.int32), (1, 1))
        zero, one = (ops.constant(f"cache.{n}", np.full((1, 1), n, np.int32)) for n in (0, 1))
        places = ops.constant("cache.places", np.arange(ops.spec.max_length, dtype=np.int32)[None])
        step = ops.binary("cache.step", places, ops.reshape("cache.start", write_at, (0, 1)), operations.SUB)
        last = ops.binary("cache.last", count, one, operations.SUB)
        ops.binary("cache.inside", ops.binary("cache.from", step, zero, operations.MAX), last, operations.MIN)
        before = ops.binary("cache.before", step, zero, operations.LESS)
        after = ops.out("cache.not_before", ops.network.add_unary(before, ops.trt.UnaryOperation.NOT))
        fresh = ops.binary("cache.fresh", after, ops.binary("cache.until", step, count, operations.LESS), operations.AND)
        ops.reshape("cache.takes", fresh, (0, 1, -1, 1))
    return ops.values["cache.inside"], ops.values["cache.takes"]


def attend(ops: TensorRTLayers, name: str, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T where mask) v, query heads grouped by their key head: [B, H, S, D]. No row of the mask is empty."""
    spec, operation = ops.spec, ops.trt.MatrixOperation
    groups = spec.num_heads // spec.num_kv_heads
    grouped = ops.reshape(f"{name}.grouped", q, (0, spec.num_kv_heads, groups, -1, spec.head_dim))
    keys = ops.reshape(f"{name}.keys", keys, (0, spec.num_kv_heads, 1, -1, spec.head_dim))
    values = ops.reshape(f"{name}.values", values, (0, spec.num_kv_heads, 1, -1, spec.head_dim))
    scores = ops.network.add_matrix_multiply(grouped, operation.NONE, keys, operation.TRANSPOSE)
    wide = ops.wide(f"{name}.wide", ops.out(f"{name}.scores", scores))
    shown = ops.reshape("mask.grouped", mask, (0, 1, 1, -1, spec.max_length))
    masked = ops.out(f"{name}.masked", ops.network.add_select(shown, wide, ops.scalar("mask.hidden", -1e30, 5)))
    softmax = ops.network.add_softmax(masked)
    ops.made(f"{name}.softmax", softmax).axes = 1 << 4
    weights = ops.narrow(f"{name}.weights", ops.out(f"{name}.softmax", softmax))
    out = ops.network.add_matrix_multiply(weights, operation.NONE, values, operation.NONE)
    return ops.reshape(name, ops.out(f"{name}.out", out), (0, spec.num_heads, -1, spec.head_dim))
