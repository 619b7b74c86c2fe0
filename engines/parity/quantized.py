"""Quantisation as the parity check sees it: what a format does to weights, and an independent audit of them.

The rounding itself is the exporter's (passed in as a function), so it must not be believed: `audit` checks, knowing
only bits and block size, that what came back is within one quantisation step of what went in. An exporter that
quantised badly would otherwise be compared with its own mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from export.precision import CODE_BITS, Precision

if TYPE_CHECKING:
    import torch

RoundTrip = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]
"""(PyTorch name of a module, its weight [out, in] float32) -> the same, after a round trip through the engine's format."""

WHOLE_ROW = 0
"""As a block size: one block a row."""

_PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj|lm_head")


def every_projection(name: str) -> bool:
    """Attention and MLP projections and the head; never the embedding table. ``name`` is a PyTorch module name."""
    return _PROJECTION.fullmatch(name) is not None


@dataclass(frozen=True)
class Quantization:
    """How an engine is quantised: weights to ``bits`` in blocks of ``block_size``, and activations to int8 in blocks of
    ``activation_block``, or not (None).

    ``head_bits``, ``head_block``: of the language-model head, where they differ. ``narrow_embedding``: the embedding table is
    stored as float16. ``float8``: the codes are float8_e4m3fn instead of integers.
    """

    bits: int
    block_size: int
    round_trip: RoundTrip
    applies: Callable[[str], bool] = every_projection
    activation_block: int | None = None
    head_bits: int | None = None
    head_block: int | None = None
    narrow_embedding: bool = False
    float8: bool = False

    def bits_of(self, name: str) -> int:
        """Bits of one module's weight, by its PyTorch name."""
        return self.head_bits if name == "lm_head" and self.head_bits is not None else self.bits

    def block_of(self, name: str) -> int:
        """Block size of one module's weight, WHOLE_ROW for one block a row."""
        return self.head_block if name == "lm_head" and self.head_block is not None else self.block_size

    def describe(self) -> str:
        """In a few words, for the report."""
        kind = "float8" if self.float8 else f"int{self.bits}"
        return f"{kind}, " + ("one scale a row" if self.block_size == WHOLE_ROW else f"blocks of {self.block_size}")

    def blocks(self, name: str, weight: NDArray[np.float32]) -> NDArray[np.floating]:
        """A matrix [N, K] in blocks [N, blocks, size], zero padded; float64 where steps depend on the logarithm of a value."""
        size = self.block_of(name) or weight.shape[1]
        if rest := -weight.shape[1] % size:
            weight = np.pad(weight, ((0, 0), (0, rest)))
        return weight.reshape(len(weight), -1, size).astype(np.float64 if self.float8 else np.float32, copy=False)

    def blocks_and_step(self, name: str, weight: NDArray[np.float32]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """The matrix in blocks [N, blocks, size], zero padded, and what one step of the format is there.

        Integers: 2 max|w| / (2**bits - 1) of the block, the coarsest sensible step. float8_e4m3fn: 3 bits behind the leading one
        of each value, in units that put the block's largest at 448; below 2**-6 of those units steps no longer shrink.
        """
        blocks = self.blocks(name, weight)
        largest = np.abs(blocks).max(-1, keepdims=True)
        if not self.float8:
            return blocks, largest * np.float32(2 / (2 ** self.bits_of(name) - 1))
        unit = np.where(largest > 0, largest, 1) / 448
        exponent = np.floor(np.log2(np.maximum(np.abs(blocks) / unit, 2.0**-6)))
        return blocks, 2.0 ** (exponent - 3) * unit


def quantization_of(precision: Precision) -> Quantization | None:
    """What a precision means for the check; None where its projections are plain.

    Bits, block and kind are read from its formats; what a step of them is, the check works out for itself.
    """
    if not precision.quantised:
        return None
    projections, head = precision.projections, precision.head

    def round_trip(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        return (head if name == "lm_head" else projections).round_trip(weight)

    return Quantization(
        CODE_BITS[projections.code],
        max(projections.block or 0, WHOLE_ROW),
        round_trip,
        applies=every_projection if not head.plain else lambda name: name != "lm_head" and every_projection(name),
        activation_block=None if precision.activations is None else precision.activations.block,
        head_bits=CODE_BITS.get(head.code),
        head_block=head.block,
        narrow_embedding=precision.embedding.code == "float16",
        float8=projections.code == "float8_e4m3",
    )


@dataclass(frozen=True)
class Steps:
    """Errors of some rows in quantisation steps: the worst, the sum of squares, and how many weights."""

    worst: float
    squares: float
    count: int


@dataclass
class WeightAudit:
    """The errors of every quantised matrix, in units of one quantisation step of the block."""

    matrices: dict[str, Steps] = field(default_factory=dict)

    def add(self, name: str, found: Steps) -> None:
        """Further rows of a matrix."""
        known = self.matrices.get(name, Steps(0.0, 0.0, 0))
        worst = max(known.worst, found.worst, key=_sortable)
        self.matrices[name] = Steps(worst, known.squares + found.squares, known.count + found.count)

    @property
    def worst_name(self) -> str:
        """The matrix of the worst weight; "" if there is none."""
        return max(self.matrices, key=lambda name: _sortable(self.matrices[name].worst), default="")

    @property
    def worst_step(self) -> float:
        """The worst weight of all."""
        return self.matrices[self.worst_name].worst if self.matrices else 0.0

    @property
    def worst_rms(self) -> float:
        """The root mean square of the matrix where it is largest."""
        found = [float(np.sqrt(steps.squares / max(1, steps.count))) for steps in self.matrices.values()]
        return max(found, key=_sortable, default=0.0)


def _sortable(value: float) -> float:
    return np.inf if np.isnan(value) else value


def audit_weight(name: str, before: NDArray[np.float32], after: NDArray[np.float32], quantization: Quantization) -> Steps:
    """Measure |after - before| of rows [n, in] in steps of the format (`Quantization.blocks_and_step`).

    Rounding to nearest stays within one step (the extra half is for clipping at the asymmetric end of two's
    complement) and has an rms of about 0.29 steps.
    """
    old, step = quantization.blocks_and_step(name, before)
    error = quantization.blocks(name, after) - old
    np.abs(error, out=error)
    # A block of zeros has no step: it must come back as it was. Elsewhere a product is many times faster than a masked division.
    nothing = step == 0
    with np.errstate(over="ignore"):
        error *= 1 / np.where(nothing, 1, step)
    if nothing.any():
        error = np.where((error > 0) & nothing, np.inf, error)
    flat = error.reshape(-1)
    return Steps(float(flat.max()), float(np.dot(flat, flat)), flat.size)


def round_to_int8(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Symmetric int8 round trip of x [..., n] in blocks along the last axis, as integer kernels do with their input."""
    import torch

    width = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -width % block_size)).unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (blocks / scale).round(), 0.0) * scale
    return rounded.flatten(-2)[..., :width]
