"""TEST DOUBLE: an engine runner that recomputes the whole sequence with tests/doubles/reference.py at every step.

Slow and without a cache, and right by construction; ``Reference(faults=...)`` makes it wrong in a named way, and
``late`` makes decode see every token one position late, which only a decode check can notice.
"""

from __future__ import annotations

import numpy as np


class ReferenceRunner:
    def __init__(self, reference, num_slots=2, late=False):
        self.reference = reference
        self.vocab_size = reference.spec.vocab_size
        self.max_length = reference.spec.max_length
        self.num_slots = num_slots
        self.late = late
        self.slots = {}
        self.most_open = 0

    def open(self):
        slot = min(set(range(self.num_slots)) - set(self.slots))
        self.slots[slot] = []
        self.most_open = max(self.most_open, len(self.slots))
        return slot

    def close(self, slot):
        del self.slots[slot]

    def release(self):
        self.released = True

    def prefill(self, slot, tokens, *, all_logits=False):
        self.slots[slot] += [int(token) for token in tokens]
        logits, _ = self.reference(np.array([self.slots[slot]]))
        logits = logits[0, -len(tokens) :].astype(np.float32)
        return logits if all_logits else logits[-1]

    def decode(self, slots, tokens):
        rows = []
        for slot, token in zip(slots, tokens, strict=True):
            self.slots[slot].append(int(token))
            positions = np.arange(len(self.slots[slot]))[None]
            if self.late:
                positions = positions + (positions == positions[0, -1])
            rows.append(self.reference(np.array([self.slots[slot]]), positions)[0][0, -1])
        return np.stack(rows).astype(np.float32)

    def taps(self, ids):
        taps = {}
        self.reference(ids[None], taps=taps)
        return {name: value[0].astype(np.float32) for name, value in taps.items()}
