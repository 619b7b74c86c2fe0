"""Checks that need a tensor's values: finite everywhere, unit norm where the architecture says so."""

from __future__ import annotations

import math

import torch

from ngpt.checkpoint.table import Expected
from ngpt.errors import TensorValueError

_BLOCK = 1 << 22  # elements looked at together: bounds private memory for any tensor
_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def check_values(name: str, tensor: torch.Tensor, expected: Expected) -> None:
    """Raise `TensorValueError` if ``tensor`` holds NaN or Inf, or vectors that are off the unit sphere."""
    if expected.unit_axis is None:
        _check_finite(name, tensor)
        return
    axis = expected.unit_axis
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
    _check_norms(name, squares.sqrt(), storage_dtype(tensor.dtype, narrow), tensor.shape[axis], expected)


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


def _check_norms(name: str, norms: torch.Tensor, dtype: torch.dtype, length: int, expected: Expected) -> None:
    tolerance = norm_tolerance(dtype, length)
    off = (norms - 1).abs()
    if expected.zero_vectors:
        off = torch.where(norms == 0, 0.0, off)
    worst = int(off.argmax())
    if float(off[worst]) <= tolerance:
        return
    vector = "row" if expected.unit_axis == 1 else "column"
    raise TensorValueError(
        f"tensor {name!r} is not unit norm: {vector} {worst}, {int((off > tolerance).sum())} {vector}s in all",
        expected=f"norm 1 within {tolerance:.2g} ({str(dtype).removeprefix('torch.')} rounding)",
        found=f"norm {float(norms[worst]):.6g}",
        remedy="normalise the weights after the last optimiser step, or check that this is an nGPT checkpoint",
    )
