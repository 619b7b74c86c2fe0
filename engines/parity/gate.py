"""The gate: an engine passes when its error is a small multiple of the noise its own precision shows.

Every check compares a measured error with the *noise*: the distance, on the same tokens, between the wide reference
and the PyTorch model in the engine's precision. All distances are linear in the size of the perturbation (KL enters
by its square root), so that one multiple means the same everywhere. Why these multiples: see docs/parity.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engines.parity.compare import Array, Distance
from engines.parity.prompts import TokenSequence
from engines.parity.quantized import WeightAudit
from export.taps import position_of

MEAN_MULTIPLE = 4.0
WORST_MULTIPLE = 8.0
LOSS_MULTIPLE = 2.0
MARGIN_MULTIPLE = 4.0
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Check:
    """One comparison; ``measured``, ``noise`` and ``limit`` in the same unit.

    ``sample``: how many things (positions, matrices, runs) it was decided on. Nothing is decided on none. ``tap``: the name of
    the value inside the network that it is about, or "".
    """

    name: str
    measured: float
    noise: float
    limit: float
    unit: str
    sample: int
    tap: str = ""

    @property
    def outcome(self) -> str:
        """ "pass", "fail" (NaN is one) or, without a sample, "not applicable"."""
        if self.sample < 1:
            return "not applicable"
        return "pass" if self.measured <= self.limit else "fail"

    @property
    def passed(self) -> bool:
        """Whether it was decided, and the measured value is within the limit."""
        return self.outcome == "pass"

    @property
    def failed(self) -> bool:
        """Whether it was decided, and the measured value is not within the limit."""
        return self.outcome == "fail"


@dataclass(frozen=True)
class Measured:
    """The distances of the engine and of the noise run from the same reference, one entry per sequence."""

    sequences: list[TokenSequence]
    engine: list[Distance]
    noise: list[Distance]
    logit_size: float  # rms of the reference's logits
    precision: str  # of the engine's arithmetic outside quantised products


@dataclass(frozen=True)
class Loss:
    """What quantised weights cost against the original ones, and what the format's step alone would cost."""

    quantized: list[Distance]
    perturbed: list[Distance]

    def check(self) -> Check:
        """The mean over all positions of sqrt(KL), which is linear in the error of the weights."""
        cost, expected = (float(np.sqrt(np.concatenate([d.kl for d in ds])).mean()) for ds in (self.quantized, self.perturbed))
        positions = sum(len(d.kl) for d in self.quantized)
        return Check("quantisation loss: sqrt(KL), mean", cost, expected, LOSS_MULTIPLE * expected, "sqrt(nat)", positions)


def checks(
    measured: Measured, audit: WeightAudit | None = None, loss: Loss | None = None, served: WeightAudit | None = None
) -> list[Check]:
    """Every check of the gate. The verdict is "pass" iff some pass and none fails. `served`: the audit of the weights that lie in
    the engine's own file."""
    found = []
    # A precision in which PyTorch itself overflows gives no yardstick: that must not look like the engine's fault.
    for what, distances in (("every output", measured.engine), ("the noise, PyTorch in this precision,", measured.noise)):
        finite = all(d.finite for d in distances)
        found.append(Check(f"{what} is finite", 0.0 if finite else 1.0, 0.0, 0.0, "", len(distances)))
    # No result can be closer than the rounding of the engine's own output: the floor below any noise.
    roundoff = ROUNDOFF[measured.precision]
    for phase in ("prefill", "decode"):
        part = phase_of(phase)
        found += _pair(f"{phase}: logit error", measured, part, lambda d: d.rms, roundoff * measured.logit_size, "logit")
        found += _pair(f"{phase}: sqrt(KL)", measured, part, lambda d: np.sqrt(d.kl), roundoff, "sqrt(nat)")
        found += _pair(f"{phase}: angle of logits", measured, part, lambda d: d.logit_angle, roundoff, "rad")
        found += _pair(f"{phase}: norm ratio of logits", measured, part, lambda d: np.abs(d.norm_ratio - 1), roundoff, "")
    found.append(_top1(measured))
    if not (taps := tapped(measured.engine)):
        found.append(Check("values inside the engine", 0.0, 0.0, 0.0, "", 0))  # a plan shows its logits alone
    for tap in taps:
        found += _pair(f"angle at {tap}", measured, None, partial(_at, tap), roundoff, "rad", tap)
    if audit is not None:
        found += _weights(audit, served)
    if loss is not None:
        found.append(loss.check())
    return found


def _weights(audit: WeightAudit, served: WeightAudit | None) -> list[Check]:
    """Those that lie in the engine's file where they can be read, else the reference's own."""
    own, what = (audit, "quantised weights") if served is None else (served, "weights in the engine's file")
    count = len(own.matrices)
    found = [
        Check(f"{what}, worst ({own.worst_name})", own.worst_step, 0.5, 1.01, "step", count),
        Check(f"{what}, rms", own.worst_rms, 0.29, 0.5, "step", count),
        Check("some weights are quantised", 0.0 if count else 1.0, 0.0, 0.0, "", 1),
    ]
    if served is not None:
        lacking = len(audit.matrices)
        found.append(Check("quantised matrices that the engine's file lacks", lacking, 0.0, 0.0, "", count + lacking))
    return found


def tapped(distances: list[Distance]) -> list[str]:
    """Taps that some sequence has, in the order of the forward pass."""
    return sorted({name for d in distances for name in d.angles}, key=position_of)


def phase_of(phase: str) -> Callable[[TokenSequence], slice]:
    """The positions of a sequence that belong to a phase."""
    if phase == "prefill":
        return lambda sequence: slice(0, sequence.prompt_length)
    return lambda sequence: slice(sequence.prompt_length, None)


_NONE: Array = np.zeros(0)


def _at(tap: str, found: Distance) -> Array:
    return found.angles.get(tap, _NONE)


def _pair(
    name: str,
    measured: Measured,
    part: Callable[[TokenSequence], slice] | None,
    value: Callable[[Distance], Array],
    floor: float,
    unit: str,
    tap: str = "",
) -> list[Check]:
    """The mean over all positions, and the worst position (a fault of one slot or step hides in a mean)."""

    def gather(distances: list[Distance]) -> Array:
        pieces = [
            value(d)[part(s) if part is not None else slice(None)] for s, d in zip(measured.sequences, distances, strict=True)
        ]
        return np.concatenate(pieces)

    ours, noise = gather(measured.engine), gather(measured.noise)
    if not len(ours):
        return [Check(f"{name}, {which}", 0.0, 0.0, 0.0, unit, 0, tap) for which in ("mean", "worst position")]
    mean, worst = max(float(noise.mean()), floor), max(float(noise.max()), floor)
    return [
        Check(f"{name}, mean", float(ours.mean()), float(noise.mean()), MEAN_MULTIPLE * mean, unit, len(ours), tap),
        Check(f"{name}, worst position", float(ours.max()), float(noise.max()), WORST_MULTIPLE * worst, unit, len(ours), tap),
    ]


def stable_margin(measured: Measured) -> float:
    """The margin above which the first choice must agree, in logits: two logits that each move by twice the noise's worst error
    close a gap of four times it."""
    return MARGIN_MULTIPLE * max(float(d.max_abs.max()) for d in measured.noise)


def stable_positions(measured: Measured) -> list[np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Positions whose reference margin exceeds what the permitted noise could close, per sequence."""
    return [d.margin > stable_margin(measured) for d in measured.engine]


def _top1(measured: Measured) -> Check:
    stable = stable_positions(measured)
    wrong = sum(int((~d.top1[kept]).sum()) for d, kept in zip(measured.engine, stable, strict=True))
    decided = sum(int(kept.sum()) for kept in stable)
    return Check("first choice differs where the margin is stable", float(wrong), 0.0, 0.0, "positions", decided)


def verdict_of(found: Sequence[Check]) -> str:
    """ "pass" iff some check passed and none failed."""
    return "pass" if any(check.passed for check in found) and not any(check.failed for check in found) else "fail"
