"""What becomes of a weight before the reference uses it: rounded as the engine's format rounds, or moved at random. A block of
rows at a time, on every core: an 8B model's head in float64 would take gigabytes."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.backends import StoredRows
from engines.parity.quantized import Quantization, WeightAudit, audit_weight
from export.weights import branch_scale
from ngpt.checkpoint import Checkpoint
from ngpt.tensor_names import LM_HEAD, RowsScaled, canonical_tensors

if TYPE_CHECKING:
    import torch

_AT_ONCE = 1 << 20  # weights of a block: its float64 temporaries stay in the caches


Factors = Callable[[str], NDArray[np.float32] | None]
"""PyTorch name of a module -> what an engine multiplies its rows by [out], or None."""


class Change(Protocol):
    """A change of the quantised matrices and of the embedding table."""

    def applies(self, module: str) -> bool:
        """Whether a module's weight is changed, by its PyTorch name."""

    def rows(self, module: str, first_row: int, before: NDArray[np.float32]) -> NDArray[np.float32]:
        """Some rows [n, in] of the weight, the first of them row `first_row`, changed. Called from several threads."""

    def embedding(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table, changed."""


class _Rounded:
    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization

    def applies(self, module: str) -> bool:
        return self.quantization.applies(module)

    def embedding(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.half() if self.quantization.narrow_embedding else rows


class QuantizedWeights(_Rounded):
    """The weights after the exporter's round trip, each block of them audited against what it was.

    An engine rounds rows into which scales are folded (suv, sz). Where its own scales are rounded to float16 that is not what
    rounding the row alone gives: `factors` says what its rows are multiplied by. `stored` gives the rows that lie in the engine's
    own file: they are audited then (`served`), so that one wrong block of thousands of millions of weights is found, which
    no value inside the network would show.
    """

    def __init__(
        self, quantization: Quantization, factors: Factors = lambda module: None, stored: StoredRows | None = None
    ) -> None:
        super().__init__(quantization)
        self.audit, self.served = WeightAudit(), WeightAudit()
        self._stored = stored
        self._factors: dict[str, NDArray[np.float32] | None] = {}
        self._read, self._lock = factors, threading.Lock()

    def rows(self, module: str, first_row: int, before: NDArray[np.float32]) -> NDArray[np.float32]:
        factor, folded = self._factor(module), before
        if factor is None:
            after = self.quantization.round_trip(module, before)
        else:
            by = factor[first_row : first_row + len(before), None]
            folded = before * by
            rounded = self.quantization.round_trip(module, folded)
            # A row times zero is zero in the engine, and multiplied by zero in the reference, whatever it is.
            after = np.divide(rounded, by, out=before.copy(), where=by != 0)
        own = None if self._stored is None else self._stored(module, first_row, len(before))
        # What lies in the engine's file comes from the same rounding: one audit is enough, and that of the file says more.
        audit, rounded = (self.audit, after) if own is None else (self.served, own)
        found = audit_weight(module, before if own is None else folded, rounded, self.quantization)
        with self._lock:
            audit.add(module, found)
        return after

    def _factor(self, module: str) -> NDArray[np.float32] | None:
        with self._lock:
            if module not in self._factors:
                self._factors[module] = self._read(module)
            return self._factors[module]


class PerturbedWeights(_Rounded):
    """The weights, to each of them an error added that is drawn evenly from half a step either side.

    That is what rounding to nearest does to a weight, with the exporter's own rounding left out of it: the format's step alone
    decides how far this model is from the original.
    """

    def __init__(self, quantization: Quantization, seed: int) -> None:
        super().__init__(quantization)
        self.seed = seed

    def rows(self, module: str, first_row: int, before: NDArray[np.float32]) -> NDArray[np.float32]:
        random = np.random.default_rng([self.seed, zlib.crc32(module.encode()), first_row])
        blocks, step = self.quantization.blocks_and_step(module, before)
        moved = blocks + step * (random.random(blocks.shape, dtype=np.float32) - np.float32(0.5))
        return moved.reshape(len(before), -1)[:, : before.shape[1]].astype(np.float32)


def folded_factors(checkpoint: Checkpoint, arithmetic: str) -> Factors:
    """What an engine of this arithmetic folds into the rows of a module's matrix, from the table of tensors."""
    spec = checkpoint.spec
    branch = branch_scale(spec, arithmetic)
    folds = {tensor.stored: (name, tensor) for name, tensor in canonical_tensors(spec).items()}
    if spec.tied:  # the head's rows are the table's, and the table itself is not folded
        folds[LM_HEAD] = ("head.weight", canonical_tensors(spec)["head.weight"])

    def factors(module: str) -> NDArray[np.float32] | None:
        name, tensor = folds[f"{module}.weight"]
        scale = branch if ".mlp.up." in name else 1.0
        if not isinstance(tensor.fold, RowsScaled):
            return None if scale == 1.0 else np.full(tensor.shape[0], scale, np.float32)
        rows, fold = tensor.shape[0], tensor.fold
        vector = checkpoint.get(fold.by).double().reshape(-1).numpy()[fold.part * rows : (fold.part + 1) * rows]
        return (vector * fold.factor(spec) * scale).astype(np.float32)

    return factors


def changed(name: str, tensor: torch.Tensor, change: Change | None, *, first_row: int = 0) -> torch.Tensor:
    """A stored tensor as the reference uses it: float32 where it is changed, else as it is. `first_row`: what row of the
    parameter `name` the tensor begins with."""
    module = name.removesuffix(".weight")
    if change is None or module == name or not change.applies(module):
        return tensor
    import torch

    out = torch.empty(tensor.shape, dtype=torch.float32)
    step = max(1, _AT_ONCE // tensor.shape[1])

    def work(start: int) -> None:
        before = np.ascontiguousarray(tensor[start : start + step].float().numpy())
        out[start : start + step] = torch.from_numpy(np.array(change.rows(module, first_row + start, before), np.float32))

    starts = range(0, len(tensor), step)
    if len(starts) == 1:
        work(0)
        return out
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        list(pool.map(work, starts))
    return out
