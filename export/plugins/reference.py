"""What the kernels compute, in NumPy float64, and how far float32 arithmetic and the storage type may take them from it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.plugins.kernels import HypersphereUpdate, QKNorm

Array = NDArray[np.float64]
# Significant bits, and the exponent of the smallest subnormal.
STORAGE = {"float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}
# Roundings of float32 arithmetic, in units of 2^-24, in one term of a result and in a row's length. The emulated kernels
# need between 0.5 and 1 over all shapes and ranges of the tests; a device's reciprocal and its square root add up to 7.
ROUNDINGS = 8


def hypersphere_update(kernel: HypersphereUpdate, h: Array, x: Array, lr: Array) -> tuple[Array, Array]:
    """(expected, allowed error), both [rows, size], for h and x [rows, size] and lr [size]."""
    unit = _unit(x, kernel.eps)
    moved = h * (1 - lr) + lr * unit
    terms = np.abs(h) + np.abs(lr) * (np.abs(unit) + np.abs(h))
    return _normalized(kernel.dtype, moved, terms, np.ones(1))


def qk_norm(
    kernel: QKNorm, qk: Array, cos: Array, sin: Array, positions: NDArray[np.int64], q_scale: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """((q, k), (allowed error of q, of k)), each [B, heads, S, D], for qk [B, S, (H + K) * D] and positions [B, S]."""
    batch, sequence = positions.shape
    heads = qk.reshape(batch, sequence, -1, kernel.head_dim).transpose(0, 2, 1, 3)
    half = kernel.rotary_dim // 2
    c, s = (table[positions][:, None] for table in (cos, sin))
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    turned = np.concatenate((a * c - b * s, b * c + a * s, rest), -1)
    sizes = (np.abs(a * c) + np.abs(b * s), np.abs(b * c) + np.abs(a * s), np.abs(rest))
    scale = np.ones((heads.shape[1], 1, kernel.head_dim))
    scale[: kernel.heads, 0] = q_scale.reshape(kernel.heads, kernel.head_dim)
    expected, allowed = _normalized(kernel.dtype, turned, np.concatenate(sizes, -1), scale)
    split = [kernel.heads]
    q, k = np.split(expected, split, axis=1)
    return (q, k), tuple(np.split(allowed, split, axis=1))  # type: ignore[return-value]


def _unit(values: Array, eps: float = 0.0) -> Array:
    length = np.linalg.norm(values, axis=-1, keepdims=True) + eps
    return np.divide(values, length, out=np.zeros_like(values), where=length != 0)


def _normalized(dtype: str, values: Array, terms: Array, scale: Array) -> tuple[Array, Array]:
    """norm(values) * scale and its error, where each value was added up from terms of these magnitudes."""
    bits, smallest = STORAGE[dtype]
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    safe = np.where(length == 0, 1, length)
    result = _unit(values) * scale
    # A float32 product of subnormals is rounded to a multiple of 2^-149 whatever its size.
    noise = ROUNDINGS * (2.0**-24 * terms + 2.0**-149) / safe
    drift = ROUNDINGS * 2.0**-24 + np.linalg.norm(noise, axis=-1, keepdims=True)
    allowed = noise * np.abs(scale) + np.abs(result) * (drift + 2.0**-bits) + 2.0 ** (smallest - 1)
    return result, np.where(length == 0, 0, allowed)
