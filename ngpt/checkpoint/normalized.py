"""A checkpoint projected back onto the unit sphere, as the training recipe does after every step (paper section 2.6)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ngpt.checkpoint.base import Checkpoint
from ngpt.checkpoint.value_checks import norms_of, off_sphere
from ngpt.progress import Progress, silent
from ngpt.tensor_names import Expected, expected_tensors

_BLOCK = 1 << 21  # float64 elements in flight


@dataclass(frozen=True)
class Change:
    """What projecting did to one tensor: ``vectors`` of its ``of`` rows (columns) were scaled to norm 1.

    ``lowest`` and ``highest`` are the norms of those vectors before; ``relative`` is the norm of the whole change
    over the norm of the tensor. Vectors that are exactly zero have no direction and stay.
    """

    name: str
    vectors: int
    of: int
    lowest: float
    highest: float
    relative: float


def normalize(checkpoint: Checkpoint, progress: Progress = silent) -> tuple[Checkpoint, list[Change]]:
    """(the checkpoint with every vector on the sphere, what that changed). Reads every matrix once.

    Only vectors off by more than the rounding of what they are stored in are scaled, in float64, and rounded to the tensor's
    dtype: all others, and everything that is no unit-norm matrix, keep their bits. Files and digest are those of the original:
    write the result with `save_hf` and open that. Raises `TensorValueError` for NaN and Inf.
    """
    table = expected_tensors(checkpoint.spec)
    factors: dict[str, torch.Tensor] = {}
    changes = []
    names = [name for name in checkpoint.names() if table[name].unit_axis is not None]
    for done, name in enumerate(names):
        progress(f"normalizing {name}", done / len(names))
        found = _factors(checkpoint, name, table[name])
        if found is not None:
            factors[name], change = found
            changes.append(change)
    source = NormalizedSource(checkpoint, {name: (_axis(table[name]), scale) for name, scale in factors.items()})
    return Checkpoint(checkpoint.path, checkpoint.config, source, text=checkpoint.text, off_sphere=checkpoint.off_sphere), changes


def _axis(expected: Expected) -> int:
    assert expected.unit_axis is not None  # only such tensors are asked about
    return expected.unit_axis


def _factors(checkpoint: Checkpoint, name: str, expected: Expected) -> tuple[torch.Tensor, Change] | None:
    """(a factor per vector, float64; what it does), or nothing if no vector is off."""
    tensor, axis = checkpoint.get(name), _axis(expected)
    norms, dtype = norms_of(name, tensor, axis)
    off = off_sphere(norms, dtype, tensor.shape[axis], expected) & (norms > 0)
    if not bool(off.any()):
        return None
    before = norms[off]
    relative = (before - 1).square().sum().sqrt() / norms.square().sum().sqrt()
    change = Change(name, int(off.sum()), len(norms), float(before.min()), float(before.max()), float(relative))
    return torch.where(off, 1 / norms.clamp_min(torch.finfo(torch.float64).tiny), 1.0), change


class NormalizedSource:
    """The tensors of a checkpoint, some of them scaled on reading: name to (axis of the unit vectors, a factor for each)."""

    def __init__(self, checkpoint: Checkpoint, factors: dict[str, tuple[int, torch.Tensor]]) -> None:
        self._checkpoint = checkpoint
        self._factors = factors
        self.infos = {name: checkpoint.info(name) for name in checkpoint.names()}
        self.files = checkpoint.files
        self.places: dict[str, Path] = {}

    def get(self, name: str) -> torch.Tensor:
        """The stored tensor, or its vectors scaled, a block of rows at a time."""
        tensor = self._checkpoint.get(name)
        if name not in self._factors:
            return tensor
        axis, scale = self._factors[name]
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
        step = max(1, _BLOCK // max(1, tensor.shape[1]))
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] = (tensor[rows].double() * (scale[rows, None] if axis == 1 else scale)).to(tensor.dtype)
        return out

    def close(self) -> None:
        """Release the original's files."""
        self._checkpoint.close()
