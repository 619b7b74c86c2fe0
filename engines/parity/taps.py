"""How far apart two values of the network's inside are (`export.taps` has their names)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LENGTH_COUNTS = ("embed", "attn.q_scaled", "attn.k_norm", "attn.v", "attn.out", "attn.update", "mlp.update")


def tap_distance(name: str, reference: NDArray[np.floating], run: NDArray[np.floating]) -> Array:
    """How far two values [T, n] of a tap are apart at each position [T].

    The length of the difference over that of the reference, which for a small difference of equal lengths is the angle in
    radians: hidden states must have unit norm, and one that has not is as wrong as one that points elsewhere. Of what a norm
    follows the angle alone, because its length says nothing (float16 engines scale relu2's branch).
    """
    x, y = (np.asarray(value, np.float64).reshape(len(value), -1) for value in (reference, run))
    if name.split(".", 2)[-1] not in _LENGTH_COUNTS:
        return angle(x, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = np.linalg.norm(y - x, axis=-1)
        relative: Array = np.divide(apart, np.linalg.norm(x, axis=-1), out=np.zeros_like(apart), where=apart != 0)
    return relative


def angle(a: NDArray[np.floating], b: NDArray[np.floating]) -> Array:
    """Radians between the directions of rows of a and b, accurate for tiny angles (arccos is not). Two rows of zeros have the
    same direction; one of them and another row are half of a half turn apart."""
    x, y = (_unit(np.asarray(value, np.float64)) for value in (a, b))
    opening: Array = 2 * np.arctan2(np.linalg.norm(x - y, axis=-1), np.linalg.norm(x + y, axis=-1))
    return opening


def _unit(x: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        length = np.linalg.norm(x, axis=-1, keepdims=True)
        return np.divide(x, length, out=np.zeros_like(x), where=length != 0)
