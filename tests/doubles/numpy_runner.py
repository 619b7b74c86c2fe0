"""A double of a model runner: a tiny recurrent network in NumPy.

Each token and its position are mixed into the slot's state, so the logits depend on the whole prefix and its
order; every row is computed by itself, so they depend on nothing else. Failures can be ordered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engines.runtime.errors import CapacityError


class NumpyRunner:
    """Implements engines.runtime.runner.Runner and records what it was asked to do."""

    def __init__(self, vocab_size: int = 23, num_slots: int = 3, max_length: int = 64, seed: int = 0) -> None:
        self.vocab_size, self.num_slots, self.max_length = vocab_size, num_slots, max_length
        random = np.random.default_rng(seed)
        self._embed = random.normal(size=(vocab_size, 16))
        self._mix = random.normal(size=(16, 16)) / 3
        self._head = random.normal(size=(vocab_size, 16)) * 2
        self.state: dict[int, NDArray[np.float64]] = {}
        self.length: dict[int, int] = {}
        self.decode_batches: list[int] = []
        self.prefill_chunks: list[int] = []
        self.fail: dict[str, Exception] = {}  # method name -> what it raises
        self.released = False
        self.override: NDArray[np.float32] | None = None  # logits [V] returned for every position

    def _raise(self, method: str) -> None:
        if method in self.fail:
            raise self.fail[method]

    def open(self) -> int:
        self._raise("open")
        free = [s for s in range(self.num_slots) if s not in self.state]
        if not free:
            raise CapacityError("slots", expected="a free slot", found="none")
        self.state[free[0]] = np.zeros(16)
        self.length[free[0]] = 0
        return free[0]

    def close(self, slot: int) -> None:
        del self.state[slot], self.length[slot]
        self._raise("close")

    def release(self) -> None:
        self.released = True

    def _advance(self, slot: int, token: int) -> NDArray[np.float32]:
        position = self.length[slot]
        if position >= self.max_length:
            raise AssertionError("cache overrun")
        pushed = self._embed[token] + np.sin(np.arange(16) * (position + 1))
        self.state[slot] = np.tanh(self._mix @ self.state[slot] + pushed)
        self.length[slot] = position + 1
        logits = (self._head @ self.state[slot]).astype(np.float32)
        return logits if self.override is None else self.override

    def prefill(self, slot: int, tokens: NDArray[np.int64], *, all_logits: bool = False) -> NDArray[np.float32]:
        self._raise("prefill")
        self.prefill_chunks.append(len(tokens))
        rows = np.stack([self._advance(slot, int(t)) for t in tokens])
        return rows if all_logits else np.asarray(rows[-1])

    def decode(self, slots: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        self._raise("decode")
        assert len(set(slots)) == len(slots) == len(tokens)
        self.decode_batches.append(len(slots))
        return np.stack([self._advance(s, int(t)) for s, t in zip(slots, tokens, strict=True)])

    def reference(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [T, V] of a whole sequence, worked out in a slot of its own (the scheduler plays no part)."""
        self.state[-1], self.length[-1] = np.zeros(16), 0
        rows = np.stack([self._advance(-1, int(t)) for t in tokens])
        del self.state[-1], self.length[-1]
        return rows
