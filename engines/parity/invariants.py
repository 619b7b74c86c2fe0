"""What a checkpoint's weights look like, layer by layer, for the report's pictures: norms that should be one, and scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ngpt.checkpoint import Checkpoint
from ngpt.progress import Progress, silent
from ngpt.spec import NGPTSpec
from ngpt.tensor_names import Expected, expected_tensors

_BLOCK = 1 << 22  # elements looked at together: the head of an 8B model is a gigabyte and more
NORM_KINDS = {1: "norm of rows", 0: "norm of columns"}
SCALE_KIND = "scale"
_LAYERS = "model.layers."
# Of the stored vectors: the name that papers use, and the field of the spec that the network multiplies them by.
_SCALES: dict[str, tuple[str, Callable[[NGPTSpec], float]]] = {
    "attn_alpha": ("attention alpha", lambda spec: spec.attn_alpha_scale),
    "mlp_alpha": ("MLP alpha", lambda spec: spec.mlp_alpha_scale),
    "self_attn.sqk.weight": ("sqk", lambda spec: spec.sqk_scale),
    "mlp.suv.weight": ("suv", lambda spec: spec.suv_scale),
    "sz.weight": ("sz", lambda spec: spec.sz_scale),
}


@dataclass(frozen=True)
class Invariant:
    """One tensor of every layer, or one that stands outside of them.

    ``kind``: "norm of rows", "norm of columns" or "scale" (as the network uses it, the stored value times its factor).
    ``layers``: the number of the layer that each entry of ``low``, ``mean`` and ``high`` is about; none for the embedding
    table, the head and sz. ``zeros``: how many of a layer's vectors are exactly zero (pruned units), which ``low`` leaves out.
    """

    name: str
    kind: str
    layers: list[int] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    zeros: list[int] = field(default_factory=list)


def invariants_of(checkpoint: Checkpoint, progress: Progress = silent) -> list[Invariant]:
    """Every matrix with unit vectors and every vector of scales, in the order of the forward pass.

    Reads each of these tensors once, a block at a time. Norms are computed in float32: they are for pictures, and what is off
    the sphere has been refused by `Checkpoint.validate`.
    """
    found: dict[str, Invariant] = {}
    names, table = checkpoint.names(), expected_tensors(checkpoint.spec)
    for done, stored in enumerate(names):
        layer, name = _place(stored)
        progress(f"looking at {stored}", done / len(names))
        seen = _values(checkpoint, stored, name, table[stored])
        if seen is None:
            continue
        label, kind, values, zeros = seen
        entry = found.setdefault(label, Invariant(label, kind))
        if layer is not None:
            entry.layers.append(layer)
        for series, value in ((entry.low, values.min()), (entry.mean, values.mean()), (entry.high, values.max())):
            series.append(float(value))
        entry.zeros.append(zeros)
    return list(found.values())


def _values(checkpoint: Checkpoint, stored: str, name: str, expected: Expected) -> tuple[str, str, torch.Tensor, int] | None:
    """(label, kind, values, exact zeros) of a tensor that has a picture."""
    if name in _SCALES:
        label, factor = _SCALES[name]
        return label, SCALE_KIND, checkpoint.get(stored).double().reshape(-1) * factor(checkpoint.spec), 0
    if expected.unit_axis is None:
        return None
    norms = _norms(checkpoint.get(stored), expected.unit_axis)
    alive = norms[norms != 0]
    label = name.removesuffix(".weight").removesuffix("_proj").replace("self_attn.", "attn.")
    return label, NORM_KINDS[expected.unit_axis], alive if len(alive) else norms, len(norms) - len(alive)


def _place(stored: str) -> tuple[int | None, str]:
    if not stored.startswith(_LAYERS):
        return None, stored.removeprefix("model.")
    number, name = stored.removeprefix(_LAYERS).split(".", 1)
    return int(number), name


def _norms(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Norms of the vectors along an axis, float64."""
    rows = max(1, _BLOCK // max(1, tensor.shape[1]))
    parts = [torch.linalg.vector_norm(tensor[start : start + rows].float(), dim=axis) for start in range(0, len(tensor), rows)]
    if axis == 1:
        return torch.cat(parts).double()
    return torch.stack(parts).double().square().sum(0).sqrt()
