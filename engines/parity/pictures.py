"""The report's pictures, made of its numbers (`engines.parity.svg` has their coordinates)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.parity.invariants import SCALE_KIND, Invariant
from engines.parity.patterns import first_divergence
from engines.parity.steps import part_of_layer
from engines.parity.svg import Chart, Frame, Line, Row, Strip, Whiskers
from engines.parity.words import counted, excess, number, share
from export.taps import HIDDEN_STATES

if TYPE_CHECKING:
    from engines.parity.report import ParityReport, SequenceResult

MOST_PICTURED = 12  # sequences with a curve of their own; those that are furthest off
MOST_ROWS = 40  # of the strip
_UNIT_LIMIT = 1e-12  # a deviation from 1 below this is drawn as this


def drift(report: ParityReport) -> Chart | None:
    """The angle between hidden states, layer by layer: the engine, the noise, the limit."""
    states = [
        check
        for check in report.checks
        if check.tap and check.name.endswith(", mean") and part_of_layer(check.tap)[1] in HIDDEN_STATES and check.sample
    ]
    if not states:
        return None
    tap, numbers = first_divergence(report), [part_of_layer(check.tap)[0] for check in states]
    firsts = {layer: numbers.index(layer) for layer in dict.fromkeys(numbers)}
    place = firsts.get(part_of_layer(tap)[0]) if tap else None
    worst = max(states, key=share)
    every = max(1, math.ceil(len(firsts) / 16))
    return Chart(
        "Angle between hidden states, layer by layer",
        f"Mean angle between the hidden states of the engine and of the reference, after attention and after the MLP of each of "
        f"{counted(len(firsts), 'layer')}. Closest to its limit, or furthest beyond it: {worst.tap}, with "
        f"{excess(worst) or 'infinity'} times the limit.",
        lines=(
            Line("noise: PyTorch in this precision", [check.noise for check in states], "noise"),
            Line("limit", [check.limit for check in states], "limit"),
            Line("engine", [check.measured for check in states], "engine"),
        ),
        marks=() if place is None else ((place, f"first beyond: {tap}"),),
        ticks=tuple((at, str(layer)) for number, (layer, at) in enumerate(firsts.items()) if number % every == 0),
        x_label="layer",
        y_label="radians, mean",
    )


def curves(report: ParityReport) -> list[Chart]:
    """KL at each position of the sequences, at most `MOST_PICTURED` of them: those furthest from the noise."""
    limits = {check.name: check.limit for check in report.checks}
    prefill, decode = (limits.get(f"{phase}: sqrt(KL), worst position") for phase in ("prefill", "decode"))
    charts = []
    for sequence in _furthest(report.sequences, MOST_PICTURED):
        length = len(sequence.kl)
        lines = [Line("noise: PyTorch in this precision", sequence.kl_noise, "noise")]
        if prefill is not None and decode is not None:
            bound = [(prefill if position < sequence.prompt_length else decode) ** 2 for position in range(length)]
            lines.append(Line("limit of a position", bound, "limit"))
        lines.append(Line("engine", sequence.kl, "engine"))
        peak = max(range(length), key=lambda position: _size(sequence.kl[position]), default=0)
        charts.append(
            Chart(
                f"KL at each position: {sequence.name}",
                f"KL from the reference's next-token distribution to the engine's, at {length} positions, with that of the "
                f"noise. The largest is {number(sequence.kl[peak]) if length else 'none'} nat at position {peak}.",
                lines=lines,
                marks=((sequence.prompt_length, "decode"),) if 0 < sequence.prompt_length < length else (),
                y_label="nat",
                height=220,
            )
        )
    return charts


def strip(report: ParityReport) -> Strip | None:
    """Whether the first choice is the same, position by position: a row for each of at most `MOST_ROWS` sequences."""
    rows = []
    for sequence in _furthest(report.sequences, MOST_ROWS):
        other = set(sequence.other_choice)
        cells = "".join(
            ("x" if position in other else "=") if margin > sequence.stable_margin else ("~" if position in other else "?")
            for position, margin in enumerate(sequence.margin)
        )
        rows.append(Row(sequence.name, cells, min(sequence.prompt_length, len(cells))))
    if not rows:
        return None
    count = {letter: sum(row.cells.count(letter) for row in rows) for letter in "=?~x"}
    return Strip(
        "First choice of the engine and of the reference",
        f"Of {sum(count.values())} positions {count['='] + count['x']} are decidable: at {count['=']} the choice is the same, "
        f"at {count['x']} it is wrong. Elsewhere either of two tokens could be right: the same at {count['?']}, another at "
        f"{count['~']}.",
        rows=rows,
        height=34 + 26 * len(rows) + 44,
    )


def _furthest(sequences: Sequence[SequenceResult], most: int) -> list[SequenceResult]:
    """Those whose largest KL is the most times the noise's, in the order in which they were run."""

    def times(index: int) -> float:
        sequence = sequences[index]
        floor = max(sequence.kl_noise, default=0.0) or 1e-30
        return max((_size(value) for value in sequence.kl), default=0.0) / floor

    kept = sorted(sorted(range(len(sequences)), key=times, reverse=True)[:most])
    return [sequences[index] for index in kept]


def norms(invariants: Sequence[Invariant]) -> Chart | None:
    """How far from 1 the worst norm of each matrix of each layer is."""
    matrices = [item for item in invariants if item.kind != SCALE_KIND and item.layers]
    if not matrices:
        return None
    off = {
        item.name: [max(abs(a - 1), abs(b - 1), _UNIT_LIMIT) for a, b in zip(item.low, item.high, strict=True)]
        for item in matrices
    }
    name, worst = max(((name, max(values)) for name, values in off.items()), key=lambda pair: pair[1])
    return Chart(
        "How far the matrices are off the unit sphere",
        f"The largest distance from 1 of a row's (of an output projection: a column's) norm, for each matrix of each layer. "
        f"The largest of all is {worst:.2g}, in {name}.",
        lines=[Line(item.name, off[item.name], f"series{i % 7}") for i, item in enumerate(matrices)],
        x_label="layer",
        y_label="|norm - 1|, worst",
    )


def scales(invariants: Sequence[Invariant]) -> list[Frame]:
    """The range of each vector of scales, layer by layer."""
    return [
        Whiskers(
            item.name,
            f"{item.name} as the network uses it, {counted(len(item.layers), 'layer')}: "
            f"from {min(item.low):.4g} to {max(item.high):.4g}.",
            low=item.low,
            mean=item.mean,
            high=item.high,
            x_label="layer" if item.layers else "the head",
        )
        for item in invariants
        if item.kind == SCALE_KIND and item.mean
    ]


def _size(value: float) -> float:
    return value if math.isfinite(value) else math.inf
