"""What changing a checkpoint's weights did to its logits: two PyTorch models on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.parity.compare import distance
from engines.parity.prompts import make_sequences
from engines.parity.reference import Variant, run_reference
from ngpt.checkpoint import Checkpoint


@dataclass(frozen=True)
class Effect:
    """Over ``positions`` of ``sequences``, ``texts`` of them text: KL(before || after) in nats, largest change of a logit,
    and the share of positions whose first choice stayed."""

    positions: int
    sequences: int
    texts: int
    kl_mean: float
    kl_max: float
    max_abs_logit: float
    largest_logit: float
    top1_agreement: float

    def __str__(self) -> str:
        kind = f"{self.texts} of them text" if self.texts else "all of them random tokens: there is no tokenizer"
        return (
            f"KL {self.kl_mean:.3g} nat in the mean and {self.kl_max:.3g} at most, "
            f"logits moved by at most {self.max_abs_logit:.3g} "
            f"(the largest is {self.largest_logit:.3g}), first choice the same at {self.top1_agreement:.1%} of {self.positions} "
            f"positions of {self.sequences} sequences, {kind}"
        )


def logit_effect(before: Checkpoint, after: Checkpoint, *, seed: int = 0) -> Effect:
    """Run both in float32 on the parity check's own sequences, a layer in memory at a time."""
    sequences = make_sequences(before, None, max_length=before.spec.max_length, decode_steps=None, seed=seed)
    tokens, variant = [sequence.tokens for sequence in sequences], Variant("float32", "float32")
    original, changed = (run_reference(checkpoint, tokens, [variant])["float32"] for checkpoint in (before, after))
    found = [distance(a, b, s.tokens) for a, b, s in zip(original, changed, sequences, strict=True)]

    def joined(field: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.concatenate([getattr(each, field) for each in found])

    return Effect(
        positions=sum(len(s.tokens) for s in sequences),
        sequences=len(sequences),
        texts=sum(s.is_text for s in sequences),
        kl_mean=float(joined("kl").mean()),
        kl_max=float(joined("kl").max()),
        max_abs_logit=float(joined("max_abs").max()),
        largest_logit=max(float(np.abs(logits).max()) for logits in original),
        top1_agreement=float(joined("top1").mean()),
    )
