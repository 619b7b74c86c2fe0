"""Faults of runners: the network is right and its cache, positions or rows are misused. Mixins that go before a runner class.

The runners of ONNX Runtime and of TensorRT keep their books in `engines.runtime.slots`, and so does the one that plays
TensorRT-LLM's runtime (`tests/mutations/lowerings.py`): most faults are spelled once.
"""

import numpy as np

from engines.runtime.slots import Slots


class _Kept(Slots):
    """Rows that are given out as they were left."""

    def open(self):
        before = self.lengths.copy()
        slot = super().open()
        self.lengths[:] = before
        return slot

    def close(self, slot, move):
        before = self.lengths.copy()
        row = super().close(slot, move)
        self.lengths[row] = before[row]
        return row


class RowNotReset:
    """A row of the cache that another sequence had is not emptied."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._slots = _Kept(self.num_slots, self.max_length)
        if hasattr(self, "forget"):
            self.forget(lambda row: None)


class LatePositions:
    """Decoded tokens are one position later than they are."""

    late = 1


class ChunkBoundary:
    """A later piece of a prompt begins one position early, on the last token of the piece before."""

    def prefill(self, slot, tokens, *, all_logits=False):
        row = self._slots.row(slot)
        if self._slots.lengths[row] and len(tokens) > 1:
            self.shorten(row)
        return super().prefill(slot, tokens, all_logits=all_logits)


class RowsNotMoved:
    """When a sequence ends, the last row's length goes into its place and the row's keys and values do not."""

    def move(self, source, target, length):
        return True


class RowsByNumber:
    """A step's logits come in the order of the rows, whatever order was asked for."""

    def decode(self, slots, tokens):
        return super().decode(slots, tokens)[np.argsort([self._slots.row(slot) for slot in slots])]


class LastButOne:
    """The logits after a prompt are those of its last token but one, where not all are asked for."""

    def prefill(self, slot, tokens, *, all_logits=False):
        if all_logits or len(tokens) < 2:
            return super().prefill(slot, tokens, all_logits=all_logits)
        return super().prefill(slot, tokens, all_logits=True)[-2]


class IdleRowsCounted:
    """A row that a step covers and nobody asked for (its prompt is still being read) counts a token more."""

    def decode(self, slots, tokens):
        block = self._slots.block(slots)
        logits = super().decode(slots, tokens)
        for offset in set(range(block.size)) - set(block.offsets.tolist()):
            self._slots.lengths[block.first + offset] += 1
        return logits
