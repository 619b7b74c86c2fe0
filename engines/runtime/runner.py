"""What the scheduler needs from a model: slots with a cache each, prefill, and a batched decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


@runtime_checkable
class Runner(Protocol):
    """One loaded model with `num_slots` independent caches of `max_length` positions.

    Calls come from one thread at a time. A row's logits must not depend on the other rows of the call.
    """

    vocab_size: int
    num_slots: int
    max_length: int

    def open(self) -> int:
        """Takes a free slot with an empty cache. Raises CapacityError if every slot is taken."""
        ...

    def close(self, slot: int) -> None:
        """Gives a slot back; its cache is forgotten."""
        ...

    def release(self) -> None:
        """Frees what the model holds (device memory, files). Nothing may be called after it but `release` again."""
        ...

    def prefill(self, slot: int, tokens: Tokens, *, all_logits: bool = False) -> Logits:
        """Appends int64 tokens [T] to the slot's cache; logits [V] of the last one, or [T, V] of all.

        May be called several times for one prompt, a chunk at a time.
        """
        ...

    def decode(self, slots: Sequence[int], tokens: Tokens) -> Logits:
        """Appends one int64 token to each of n distinct slots (tokens [n]); logits [n, V]."""
        ...
