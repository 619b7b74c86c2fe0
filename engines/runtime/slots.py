"""Slots of a key-value cache that many sequences share: who has which, and how long each is. Host bookkeeping only.

A slot is a number that a sequence keeps from `open` to `close`. Its row is the index in the cache's buffers at which its keys
and values lie now. A row can change when another slot is closed: the rows in use stay neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import CapacityError


class Block(NamedTuple):
    """Neighbouring rows that one step covers: rows [first, first + size)."""

    first: int
    size: int
    offsets: NDArray[np.int64]
    """[n]: the row of each slot that was asked for, counted from the block's first."""
    starts: NDArray[np.int64]
    """[size]: the position each row of the block writes to, which is its length before the step."""


class Slots:
    """Hands out the slots of a cache of `count` rows. The rows in use are kept neighbours, so that one step can cover them."""

    def __init__(self, count: int, max_length: int) -> None:
        self.count, self.max_length = count, max_length
        self.lengths = np.zeros(count, dtype=np.int64)
        """Valid positions of each row: a row's length alone says what in it is valid."""
        self._rows: dict[int, int] = {}  # slot -> row
        self._next = 0

    def row(self, slot: int) -> int:
        """The row in which the slot's keys and values lie now."""
        return self._rows[slot]

    def open(self) -> int:
        """Take a free row; returns its slot. Raises CapacityError when all are taken."""
        taken = set(self._rows.values())
        row = next((row for row in range(self.count) if row not in taken), None)
        if row is None:
            raise CapacityError("no free slot", expected=f"at most {self.count} open sequences", remedy="close one first")
        slot, self._next = self._next, self._next + 1
        self._rows[slot], self.lengths[row] = row, 0
        return slot

    def close(self, slot: int, move: Callable[[int, int, int], bool]) -> int:
        """Give the slot back; returns the row that is free now.

        `move(source, target, length)` copies a row's first `length` positions, and returns False where it cannot: the last
        row moves into the hole if possible.
        """
        row = self._rows.pop(slot)
        last = max(self._rows.values(), default=-1)
        if last > row and move(last, row, int(self.lengths[last])):
            mover = next(other for other, at in self._rows.items() if at == last)
            self._rows[mover], self.lengths[row] = row, self.lengths[last]
            row = last
        self.lengths[row] = 0
        return row

    def check_room(self, row: int, tokens: int) -> None:
        """Raises CapacityError unless `tokens` more fit the row."""
        length = int(self.lengths[row]) + tokens
        if length > self.max_length:
            raise CapacityError(
                "the sequence does not fit the engine",
                expected=f"at most {self.max_length} tokens",
                found=str(length),
                remedy="shorten the prompt or ask for fewer tokens",
            )

    def block(self, slots: Sequence[int]) -> Block:
        """The block of rows that covers `slots`, for a step of one token each. Raises CapacityError.

        A row in it that is not asked for (its prompt is still being read) computes a throw-away token: what it writes lands
        just past its end, where its own next token will be written. A full row writes on its last position: nothing
        can follow there that would read it.
        """
        rows = np.asarray([self._rows[slot] for slot in slots], dtype=np.int64)
        for row in rows:
            self.check_room(int(row), 1)
        first, size = int(rows.min()), int(rows.max() - rows.min()) + 1
        starts = np.minimum(self.lengths[first : first + size], self.max_length - 1)
        return Block(first, size, rows - first, starts)
