"""Checks that need a tensor's values: finite everywhere, unit norm where the architecture says so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ngpt.errors import TensorValueError
from ngpt.tensor_names import Expected

_BLOCK = 1 << 22  # elements looked at together: bounds private memory for any tensor
_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

OFF_SPHERE_LIMIT = 0.005
"""How far from 1 a norm may be before a checkpoint is refused: see docs/building.md, where this was measured."""


@dataclass(frozen=True)
class Deviation:
    """A tensor with vectors off the unit sphere. ``index`` and ``norm`` are those of the worst; ``count`` of all of them."""

    name: str
    vector: str
    index: int
    norm: float
    count: int
    tolerance: float
    dtype: torch.dtype

    @property
    def size(self) -> float:
        """How far the worst norm is from 1."""
        return abs(self.norm - 1)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.vector} {self.index} has norm {self.norm:.6g}, {self.count} {self.vector}(s) are off by more "
            f"than {self.tolerance:.2g} ({str(self.dtype).removeprefix('torch.')} rounding)"
        )

    def error(self, tensors: int) -> TensorValueError:
        """For a checkpoint in which so many tensors deviate, this one most."""
        what = f"tensor {self.name!r} is not unit norm: {self.vector} {self.index}, {self.count} {self.vector}s in all"
        return TensorValueError(
            what + (f", and {tensors - 1} other tensors are off as well" if tensors > 1 else ""),
            expected=f"norm 1 within {self.tolerance:.2g} ({str(self.dtype).removeprefix('torch.')} rounding)"
            + (f", or within {OFF_SPHERE_LIMIT:g} with a warning" if self.tolerance < OFF_SPHERE_LIMIT else ""),
            found=f"norm {self.norm:.6g}",
            remedy="check that this is an nGPT checkpoint; then project it back (ngpt-deploy convert --normalize), or build "
            "what the "
            "file says (--allow-off-sphere)"
            if self.norm > 0
            else "a zero vector has no direction, and the network divides by its norm: give the token an embedding, or build "
            "what the "
            "file says (--allow-off-sphere)",
        )


def check_values(name: str, tensor: torch.Tensor, expected: Expected) -> Deviation | None:
    """How ``tensor`` deviates from the unit sphere, if it does. Raises `TensorValueError` if it holds NaN or Inf."""
    if expected.unit_axis is None:
        _check_finite(name, tensor)
        return None
    norms, dtype = norms_of(name, tensor, expected.unit_axis)
    off = off_sphere(norms, dtype, tensor.shape[expected.unit_axis], expected)
    if not bool(off.any()):
        return None
    distance = torch.where(off, (norms - 1).abs(), 0.0)
    worst = int(distance.argmax())
    return Deviation(
        name=name,
        vector="row" if expected.unit_axis == 1 else "column",
        index=worst,
        norm=float(norms[worst]),
        count=int(off.sum()),
        tolerance=norm_tolerance(dtype, tensor.shape[expected.unit_axis]),
        dtype=dtype,
    )


def off_sphere(norms: torch.Tensor, dtype: torch.dtype, length: int, expected: Expected) -> torch.Tensor:
    """Which vectors of ``length`` entries are off the sphere by more than the rounding of ``dtype``, bool [vectors]."""
    off = (norms - 1).abs() > norm_tolerance(dtype, length)
    return off & (norms != 0) if expected.zero_vectors else off


def norms_of(name: str, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.dtype]:
    """(norms of the vectors along an axis, float64; the dtype whose rounding the values show). A block at a time.

    Raises `TensorValueError` if the tensor holds NaN or Inf.
    """
    squares = torch.zeros(tensor.shape[1 - axis], dtype=torch.float64)
    narrow = {torch.bfloat16: True, torch.float16: True}
    rows = max(1, _BLOCK // max(1, tensor.shape[1]))
    for start in range(0, tensor.shape[0], rows):
        block = tensor[start : start + rows]
        _check_finite(name, block, start)
        narrow = {kind: fits and _survives(block, kind) for kind, fits in narrow.items()}
        part = block.double().square().sum(dim=axis)
        if axis == 1:
            squares[start : start + rows] = part
        else:
            squares += part
    return squares.sqrt(), storage_dtype(tensor.dtype, narrow)


def storage_dtype(dtype: torch.dtype, narrow: dict[torch.dtype, bool]) -> torch.dtype:
    """The dtype whose rounding the values show: float32 files are often bfloat16 weights written wide."""
    coarsest_first = (torch.bfloat16, torch.float16)
    return next((kind for kind in coarsest_first if narrow[kind]), dtype)


def norm_tolerance(dtype: torch.dtype, length: int) -> float:
    """How far from 1 the norm of a stored unit vector of ``length`` entries may be.

    Rounding each entry by at most a relative u moves the norm by at most u; the factor 2 is for a writer that
    rounds twice. float16 adds the absolute error of its subnormals, 2**-25 an entry. Whoever normalised did so in
    float32 at best: its sum of squares is off by about sqrt(length) * 2**-24, with a margin of 4.
    """
    u = _ROUNDOFF[dtype]
    subnormal = math.sqrt(length) * 2.0**-25 if dtype == torch.float16 else 0.0
    return 2 * u + subnormal + 4 * math.sqrt(length) * 2.0**-24


def _survives(tensor: torch.Tensor, kind: torch.dtype) -> bool:
    return torch.equal(tensor.to(kind).to(tensor.dtype), tensor)


def _check_finite(name: str, tensor: torch.Tensor, first_row: int = 0) -> None:
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    where = (~finite).nonzero()
    index = where[0].tolist()
    index[0] += first_row
    value = tensor[tuple(where[0].tolist())].item()
    raise TensorValueError(
        f"tensor {name!r} is not finite",
        expected="finite numbers",
        found=f"{value} at index {index}, {len(where)} such values in this part of the tensor",
        remedy="the checkpoint is damaged or its training diverged: use an earlier one",
    )
