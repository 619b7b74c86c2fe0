"""Checks of a served model that need no logits of it: what it chose, how probable it calls that, and whether a seed is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.parity.gate import Check

CHOICE = "greedy token differs where the margin is stable"
SEEDS = "drawn answers that a seed does not bring back"


@dataclass(frozen=True)
class Chosen:
    """A token that a server chose at a position of a run, and its log-probability where it said one."""

    position: int
    token: int
    log_prob: float | None
    greedy: bool = True


Choices = Sequence[tuple[Iterable[Chosen], NDArray[Any], NDArray[Any]]]
"""Of each run: what was chosen, the reference's logits [T, V], and those of the noise."""


def choice_check(choices: Choices, margin: float) -> Check:
    """Greedy tokens against the reference's, where its first is ahead by more than `margin`."""
    wrong = decided = 0
    for chosen, reference, _ in choices:
        for each in chosen:
            row = reference[each.position]
            second, first = np.partition(row, -2)[-2:] if len(row) > 1 else (-np.inf, row[0])
            if each.greedy and first - second > margin:
                decided += 1
                wrong += int(np.argmax(row)) != each.token
    return Check(CHOICE, float(wrong), 0.0, 0.0, "positions", decided)


def probability_checks(choices: Choices, floor: float, mean_multiple: float, worst_multiple: float) -> list[Check]:
    """Log-probabilities of chosen tokens: the server's and the noise's distance from the reference's, as for logits."""
    ours, noise = [], []
    for chosen, reference, other in choices:
        for each in chosen:
            if each.log_prob is not None:
                exact = _log_softmax(reference[each.position])[each.token]
                ours.append(abs(each.log_prob - exact))
                noise.append(abs(_log_softmax(other[each.position])[each.token] - exact))
    names = ("log-probability of the chosen token, mean", "log-probability of the chosen token, worst position")
    if not ours:
        return [Check(name, 0.0, 0.0, 0.0, "nat", 0) for name in names]
    found = []
    levels = (float(np.mean(ours)), float(np.mean(noise))), (float(np.max(ours)), float(np.max(noise)))
    for name, (measured, level), multiple in zip(names, levels, (mean_multiple, worst_multiple), strict=True):
        found.append(Check(name, measured, level, multiple * max(level, floor), "nat", len(ours)))
    return found


def seed_check(differing: int, drawn: int) -> Check:
    """Answers that were drawn twice with the same seed; where all of them are the greedy ones, nothing was drawn."""
    return Check(SEEDS, float(differing), 0.0, 0.0, "answers", max(drawn, differing))


def _log_softmax(row: NDArray[Any]) -> NDArray[np.float64]:
    wide = np.asarray(row, np.float64)
    shifted = wide - wide.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
