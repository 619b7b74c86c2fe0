"""Weight-only block quantisation in NumPy: symmetric, one scale per `block_size` input channels of each output row.

It knows no runtime; the packing below is two nibbles a byte, low nibble first, which is what every runtime here reads.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 22  # weights in flight while rounding: a head of 131072 rows takes gigabytes of scratch at once


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix [N, K]: data uint8 [N, blocks, block_size * bits / 8], scales float32 [N, blocks]; value =
    (code - zero_point) * scale, with the same zero point (2**(bits - 1)) everywhere."""

    data: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int
    block_size: int
    columns: int

    def codes(self) -> NDArray[np.int16]:
        """The signed codes, zero point taken off: int16 [N, blocks * block_size]."""
        codes = self.data
        if self.bits == 4:
            codes = np.stack((codes & 15, codes >> 4), axis=-1)
        return codes.reshape(len(codes), -1).astype(np.int16) - np.int16(1 << (self.bits - 1))

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix the runtime multiplies by: float32 [N, K]."""
        blocks = self.codes().astype(np.float32).reshape(*self.scales.shape, -1) * self.scales[..., None]
        return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, : self.columns])


def quantize(weight: NDArray[np.float32], bits: int, block_size: int = 32) -> Quantized:
    """float32 [N, K] -> `Quantized`. Raises ValueError for a width other than 4 or 8 or an odd block size.

    The scale is signed so that the block's largest value lands on the code -2**(bits-1), the end of the range that has one
    code more: 4 bits then reach 8 steps instead of 7.
    """
    if bits not in (4, 8) or block_size < 16 or block_size % 2:
        raise ValueError(f"bits must be 4 or 8 and block_size even and at least 16, found {bits} and {block_size}")
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    data = np.empty((rows, blocks, block_size * bits // 8), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        data[part], scales[part] = _quantize_rows(weight[part], bits, block_size)
    return Quantized(data, scales, bits, block_size, columns)


def _quantize_rows(weight: NDArray[np.float32], bits: int, block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % block_size))).reshape(len(weight), -1, block_size)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(axis=-1)[..., None], axis=-1)
    low, zero = -(1 << (bits - 1)), 1 << (bits - 1)
    scales = largest / np.float32(low)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = (np.clip(np.rint(padded * inverse), low, zero - 1) + zero).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, scales[..., 0].astype(np.float32)


def quantize_dequantize(weight: NDArray[np.float32], bits: int, block_size: int = 32) -> NDArray[np.float32]:
    """What is left of a matrix [N, K] after `quantize`: float32 [N, K]."""
    return quantize(weight, bits, block_size).dequantize()


def quantize_fp8(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """float32 [N, K] -> (float8_e4m3fn [N, K], scale float32 [N]); value = code * scale, the row's largest at 448.

    Rows of nGPT's matrices have unit norm, so their largest values differ little and one scale a row loses little.
    """
    import ml_dtypes

    largest = np.abs(weight).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(448), np.float32(1)).astype(np.float32)
    return (weight / scale).astype(ml_dtypes.float8_e4m3fn), scale[:, 0]
