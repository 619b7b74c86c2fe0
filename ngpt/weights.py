"""`Weights`: the canonical tensors of the deployed network, folded lazily from a checkpoint.

Scales that fold exactly are folded here, once, in float64 and rounded to float32 at the end: suv * sqrt(E) into
the rows (and bias) of the MLP's up and gate projections, sz into the rows of the head. sqk enters squared on q
after the position code, so it stays a vector; the alphas become learning rates by absolute value after scaling.
Which scale goes where is said in `ngpt.tensor_names`; it is multiplied here.

    embed                        [V, E]
    layers.{i}.attn.q.weight     [H*D, E]     .k, .v [K*D, E]     .o [E, H*D]     (+ .bias [out])
    layers.{i}.attn.q_scale      [H*D]        (sqk * sqk_scale)**2, multiplies the normalised q
    layers.{i}.attn.lr           [E]
    layers.{i}.mlp.up.weight     [F, E]       (+ .bias)     suv * suv_scale * sqrt(E) folded in
    layers.{i}.mlp.gate.weight   [F, E]       (+ .bias)     gated networks only, likewise
    layers.{i}.mlp.down.weight   [E, F]       (+ .bias)
    layers.{i}.mlp.lr            [E]
    head.weight                  [V, E]       sz * sz_scale folded in, here or in the file; from the table when tied
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ngpt.checkpoint import Checkpoint
from ngpt.errors import MissingTensorError
from ngpt.tensor_names import RowsScaled, Scaled, canonical_tensors

_BLOCK = 1 << 21  # float64 elements in flight while folding


class Weights:
    """Canonical tensors by name. Nothing is kept: each `get` reads, folds and returns a new array."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self._tensors = canonical_tensors(checkpoint.spec)

    def names(self) -> tuple[str, ...]:
        """All canonical names, in the order of the forward pass."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading. Raises `MissingTensorError` for an unknown name."""
        if name not in self._tensors:
            raise MissingTensorError(f"this network has no tensor {name!r}", remedy="see Weights.names()")
        return self._tensors[name].shape

    def get(self, name: str) -> NDArray[np.float32]:
        """The tensor, float32, C-contiguous. Raises `MissingTensorError` for an unknown name."""
        self.shape(name)
        tensor = self._tensors[name]
        if isinstance(tensor.fold, Scaled):
            return self._vector_scaled(tensor.stored, tensor.fold)
        if isinstance(tensor.fold, RowsScaled):
            return self._rows_scaled(tensor.stored, tensor.shape[0], tensor.fold)
        return self._plain(tensor.stored)

    def _plain(self, stored: str) -> NDArray[np.float32]:
        # Memory of its own, so that the caller may outlive the memory map and write; widening has made it already.
        tensor = self.checkpoint.get(stored)
        if tensor.dtype == torch.float32:
            tensor = tensor.clone()
        array: NDArray[np.float32] = np.ascontiguousarray(tensor.float().numpy())
        return array

    def _vector(self, stored: str) -> NDArray[np.float64]:
        vector: NDArray[np.float64] = self.checkpoint.get(stored).double().reshape(-1).numpy()
        return vector

    def _vector_scaled(self, stored: str, fold: Scaled) -> NDArray[np.float32]:
        vector = self._vector(stored) * getattr(self.spec, fold.scale)
        if fold.then == "square":
            vector = vector**2
        elif fold.then == "absolute":
            vector = np.abs(vector)
        narrow: NDArray[np.float32] = vector.astype(np.float32)
        return narrow

    def _rows_scaled(self, stored: str, rows: int, fold: RowsScaled) -> NDArray[np.float32]:
        """Folded in float64, a block of rows at a time."""
        scales = self._vector(fold.by)[fold.part * rows : (fold.part + 1) * rows] * fold.factor(self.spec)
        tensor = self.checkpoint.get(stored)
        out = np.empty(tuple(tensor.shape), dtype=np.float32)
        step = max(1, _BLOCK // max(1, math.prod(tensor.shape[1:])))
        for start in range(0, rows, step):
            block: NDArray[np.float64] = tensor[start : start + step].to(torch.float64).numpy()
            out[start : start + step] = block * scales[start : start + step].reshape(-1, *[1] * (block.ndim - 1))
        return out
