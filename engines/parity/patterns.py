"""Failed checks put into groups, and what their pattern suggests: where somebody should look first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.parity.gate import Check
from engines.parity.steps import HEAD, part_of_layer, step_of

if TYPE_CHECKING:
    from engines.parity.report import ParityReport, SequenceResult

GROUPS = {
    "finite": "Finite numbers",
    "weights": "Stored weights",
    "prefill": "Logits of prefill",
    "decode": "Logits of decode",
    "choice": "First choice",
    "answers": "Answers of the server",
    "taps": "Values inside the network",
    "loss": "Cost of the quantisation",
}
"""Of checks, in the order in which one would look."""
_FEW, _MOST_OF = 5, 0.9


def group_of(check: Check) -> str:
    """The group of a check, a key of `GROUPS`."""
    if check.tap:
        return "taps"
    for start, group in (
        ("prefill: ", "prefill"),
        ("decode: ", "decode"),
        ("first choice", "choice"),
        ("greedy token", "choice"),
        ("log-probability", "answers"),
        ("drawn answers", "answers"),
        ("quantised weights", "weights"),
        ("quantised matrices", "weights"),
        ("weights in the engine", "weights"),
        ("values inside", "taps"),
        ("some weights", "weights"),
        ("quantisation loss", "loss"),
    ):
        if check.name.startswith(start):
            return group
    return "finite"


def grouped(checks: Sequence[Check]) -> dict[str, list[Check]]:
    """Group -> its checks, in the order of `GROUPS`; groups without one are left out."""
    found: dict[str, list[Check]] = {group: [] for group in GROUPS}
    for check in checks:
        found[group_of(check)].append(check)
    return {group: members for group, members in found.items() if members}


@dataclass(frozen=True)
class Stray:
    """A sequence with positions whose KL is beyond the limit of the worst position.

    A prompt is read twice (`engines.parity.driving`): for the logits of all its tokens, and then, as in service, for those of its
    last one, from which it goes on. Each second prompt is in two pieces the first time, the others are the second time.
    """

    index: int
    name: str
    positions: list[int]
    length: int
    prompt_length: int

    @property
    def of_first_reading(self) -> bool:
        """Whether the first position beyond the limit comes of the first reading of the prompt."""
        return self.positions[0] < self.prompt_length - 1

    @property
    def halves(self) -> bool:
        """Whether the reading that the first position comes of was in two pieces."""
        return self.prompt_length > 1 and (self.index % 2 == 1) == self.of_first_reading


def strays(report: ParityReport) -> list[Stray]:
    """Every sequence with a position that is beyond the limit, or not a number."""
    limits = {check.name: check.limit for check in report.checks}
    found = []
    for index, sequence in enumerate(report.sequences):
        prefill, decode = (limits.get(f"{phase}: sqrt(KL), worst position", math.inf) for phase in ("prefill", "decode"))
        beyond = [
            position
            for position, kl in enumerate(sequence.kl)
            # NaN is not within a limit.
            if not math.sqrt(max(kl, 0.0)) <= (prefill if position < sequence.prompt_length else decode)
        ]
        if beyond:
            found.append(Stray(index, sequence.name, beyond, len(sequence.kl), sequence.prompt_length))
    return found


def worst_sequence(report: ParityReport, tap: str = "") -> int | None:
    """The index of the sequence that is furthest off: by its angle at a tap, or by the KL of its worst position."""

    def size(sequence: SequenceResult) -> float:
        value = sequence.angles.get(tap, 0.0) if tap else max(sequence.kl, default=0.0, key=_size)
        return _size(value)

    return max(range(len(report.sequences)), key=lambda index: size(report.sequences[index]), default=None)


def first_divergence(report: ParityReport) -> str:
    """The first tap, in the order of the forward pass, whose angle leaves its limit; "" where none does."""
    return next((check.tap for check in report.checks if check.tap and check.failed), "")


def clues(report: ParityReport) -> Iterator[str]:
    """Sentences on what the failures have in common, the most telling first."""
    failed = grouped(report.failures)
    tap = first_divergence(report)
    if any("noise" in check.name for check in failed.get("finite", ())):
        yield (
            "PyTorch itself gives numbers that are not finite in this precision. There is no noise to compare with, so this says "
            "nothing about the engine: choose a wider precision for this model."
        )
    elif "finite" in failed:
        where = _where_not_finite(report)
        yield f"The engine's outputs hold NaN or infinity{where}. Look for an overflow of a narrow type there."
    if "weights" in failed:
        yield (
            "The quantised weights are not the checkpoint's, rounded to nearest. Look at the quantiser, and at how its numbers "
            "came into the engine's file, before anything else: the reference rounds with the same quantiser, so that other "
            "checks may pass."
        )
    if tap:
        yield _of_taps(report, tap)
    elif any(check.tap and check.sample for check in report.checks) and {"prefill", "decode"} <= set(failed):
        yield (
            "Every value inside the network is right and the logits are not. What is left between the two is the head: "
            f"{HEAD.suspects}."
        )
    yield from _of_phases(failed, bool(tap))
    yield from _of_sequences(report)
    if set(failed) == {"loss"}:
        yield (
            "The engine computes what its weights say, but those weights cost more than their format must. Look at how they were "
            "rounded: blocks, scales, a format of fewer bits."
        )
    if set(failed) == {"choice"}:
        yield "The logits are within their limits and yet another token is chosen: look at how logits leave the engine."
    yield from _of_size(failed)


def _of_taps(report: ParityReport, tap: str) -> str:
    layer, _ = part_of_layer(tap)
    bad = {check.tap for check in report.checks if check.tap and check.failed}
    after = {check.tap for check in report.checks if check.tap}
    order = [check.tap for check in report.checks if check.tap]
    later = {name for name in order[order.index(tap) :]} & after
    place = "Before the first layer" if layer is None else f"In layer {layer}"
    text = f"{place}, at {tap} ({step_of(tap).what}), the engine first leaves its limit. Look at {step_of(tap).suspects}."
    if len(bad) > 1 and len(bad) >= _MOST_OF * len(later):  # not quite all: queries, keys and values do not follow each other
        text += " What comes after it is off as well, as it must be: its input is wrong."
    elif len(later) > 1:
        text += (
            f" Of the {len(later)} values from there on {len(bad)} are beyond their limits: the error fades, or is close to the "
            "limit."
        )
    return text


def _of_phases(failed: dict[str, list[Check]], taps: bool) -> Iterator[str]:
    if "decode" in failed and "prefill" not in failed:
        yield (
            "Only decode fails: what reads a whole prompt is right. Look at the cache (what is written to it, and where) and at "
            "the positions after the prompt." + (" The values inside were taken without a cache." if not taps else "")
        )
    if "prefill" in failed and "decode" not in failed:
        yield (
            "Only prefill fails, and the decode that goes on from its cache does not. Look at what only a prompt of several "
            "tokens meets: the causal mask, the logits of its last position, its pieces."
        )


def _of_sequences(report: ParityReport) -> Iterator[str]:
    found = strays(report)
    if not found or len(report.sequences) < 2:
        return
    if len(found) == 1:
        (stray,) = found
        yield f"One sequence alone is beyond the limit: {stray.name}, {_places(stray)}. {_reading(stray)}"
    elif len(found) < len(report.sequences) and all(stray.halves for stray in found):
        yield "Only prompts that were read in two pieces are followed by a wrong position: look at the boundary between pieces."
    elif all(len(stray.positions) <= 2 for stray in found):
        places = "; ".join(f"{stray.name}, {_places(stray)}" for stray in found[:_FEW])
        yield f"Single positions are beyond the limit, and their neighbours are not: {places}."


def _reading(stray: Stray) -> str:
    if stray.halves and stray.positions[0] == stray.prompt_length // 2:
        return "That is where the second piece of its prompt begins: look at the boundary between pieces."
    if stray.positions[0] == stray.prompt_length - 1:
        return (
            "That is the last token of its prompt, whose logits are asked for alone, in a row that another sequence had before: "
            "look at both."
        )
    if stray.positions[0] == stray.prompt_length:
        return "That is its first step of decode: look at the row of the cache that it got, and at its first position."
    return "Look at the row of the cache that it got, and at who had it before."


def _of_size(failed: dict[str, list[Check]]) -> Iterator[str]:
    """Small excess everywhere is rounding, not a wrong formula."""
    worst = max((_excess(check) for group in ("prefill", "decode", "taps") for check in failed.get(group, ())), default=0.0)
    if 1 < worst < 3:
        yield (
            f"Nothing is beyond its limit by more than {worst:.1f} times. A wrong formula is usually off by far more: look for a "
            "product, a norm or a table in a narrower type than the precision says."
        )


def _excess(check: Check) -> float:
    return check.measured / check.limit if check.limit > 0 and math.isfinite(check.measured) else math.inf


def _where_not_finite(report: ParityReport) -> str:
    for sequence in report.sequences:
        bad = [position for position, kl in enumerate(sequence.kl) if not math.isfinite(kl)]
        if bad:
            return f", first at position {bad[0]} of {sequence.name}"
    return ""


def _places(stray: Stray) -> str:
    shown = ", ".join(map(str, stray.positions[:_FEW]))
    more = len(stray.positions) - _FEW
    word = "position" if len(stray.positions) == 1 else "positions"
    return f"{word} {shown}" + (f" and {more} more" if more > 0 else "") + f" of {stray.length}"


def _size(value: float) -> float:
    return value if math.isfinite(value) else math.inf
