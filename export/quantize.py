"""Rounding weights to narrow codes and back, in NumPy: what `export.precision.Format` says, done. It knows no runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT8_LARGEST = 448.0
"""The largest value of float8_e4m3fn."""
_SMALLEST_NORMAL = np.float32(2.0**-126)
_AT_ONCE = 1 << 22  # weights in flight while rounding: a head of 131072 rows takes gigabytes of scratch at once


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix [N, K]; value = code * scale. `scales`: float32 [N, blocks], each a number of the format's scale type.

    `data` of integers: uint8 [N, blocks, block * bits / 8], code + 2**(bits - 1), two nibbles a byte, the low one first.
    `data` of float8: float8_e4m3fn [N, K]; `bits` is then None.
    """

    bits: int | None
    data: NDArray[Any]
    scales: NDArray[np.float32]
    columns: int

    def codes(self) -> NDArray[np.int16]:
        """The signed codes of integers, zero point taken off: int16 [N, blocks * block]."""
        bits, codes = self.bits or 8, self.data
        if bits == 4:
            codes = np.stack((codes & 15, codes >> 4), axis=-1)
        return codes.reshape(len(codes), -1).astype(np.int16) - np.int16(1 << (bits - 1))

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix the runtime multiplies by: float32 [N, K]."""
        codes = self.data if self.bits is None else self.codes()
        blocks = codes.astype(np.float32).reshape(*self.scales.shape, -1) * self.scales[..., None]
        return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, : self.columns])


def quantize(weight: NDArray[np.float32], bits: int | None, block: int, scale: str) -> Quantized:
    """float32 [N, K] to integers of so many bits (None: float8_e4m3fn), with a scale of type `scale` for each `block`
    channels of a row.

    Integers: the scale is signed so that the block's largest value lands on the code -2**(bits - 1), the end of the range
    that has one code more: 4 bits then reach 8 steps instead of 7. float8: the row's largest lands on 448; rows of nGPT's
    matrices have unit norm, so one scale a row loses little.
    """
    rows, columns = weight.shape
    blocks = math.ceil(columns / block)
    shape, kind = ((rows, columns), _float8()) if bits is None else ((rows, blocks, block * bits // 8), np.uint8)
    data: NDArray[Any] = np.empty(shape, kind)
    scales = np.empty((rows, blocks), np.float32)
    step = max(1, _AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        data[part], scales[part] = _to_float8(weight[part]) if bits is None else _to_integers(weight[part], bits, block)
    return Quantized(bits, data, rounded(scales, scale).astype(np.float32), columns)


def rounded(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 rounded to float32, float16 or bfloat16; bfloat16 as ml_dtypes' type."""
    if dtype == "bfloat16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    return array.astype({"float32": np.float32, "float16": np.float16}[dtype], copy=False)


def _to_integers(weight: NDArray[np.float32], bits: int, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block))).reshape(len(weight), -1, block)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(axis=-1)[..., None], axis=-1)
    low, zero = -(1 << (bits - 1)), 1 << (bits - 1)
    scales = largest / np.float32(low)
    tiny = np.abs(scales) < _SMALLEST_NORMAL  # whose inverse may be beyond float32
    quotients = padded * np.divide(1.0, scales, out=np.zeros_like(scales), where=~tiny)
    if (inexact := tiny & (scales != 0)).any():
        np.divide(padded, scales, out=quotients, where=np.broadcast_to(inexact, padded.shape))
    codes = (np.clip(np.rint(quotients), low, zero - 1) + zero).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales[..., 0].astype(np.float32)


def _to_float8(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = largest / np.float32(FLOAT8_LARGEST)
    scale = np.where(scale < _SMALLEST_NORMAL, np.float32(1), scale).astype(np.float32)  # a row of zeros, or of nothing else
    return (weight / scale).astype(_float8()), scale


def _float8() -> Any:
    import ml_dtypes

    return ml_dtypes.float8_e4m3fn
