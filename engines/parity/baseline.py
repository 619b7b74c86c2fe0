"""A regression file: what an engine's parity, size and speed were, how far each figure moves by itself, and what moved since.

Parity figures are ratios of the engine's error to the noise: they need no tolerance that depends on the model. Their own noise is
how far they move with other random tokens; that of speeds, how far they move from run to run.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.parity.report import ParityReport
from engines.runtime.errors import EngineFileError
from engines.runtime.manifest import Manifest, read_bounded
from engines.runtime.verdict import REPORT_FILES
from ngpt.atomic_folder import replace_file
from ngpt.errors import BuildError, os_trouble

SCHEMA_VERSION = 1
RUNS = 5
NOISES = 4.0  # a figure is worse beyond so many times its own noise
FLOORS = {"parity": 0.15, "size": 0.01, "speed": 0.1}
"""A figure of a kind that moves by less than this part is the same, however small its noise was measured: another processor sums
in another order."""
_SIZE, _SPEED = "size of the engine, bytes", "speed against PyTorch: "
_EQUAL = 1e-5  # figures are recorded with six digits
_MOST_BYTES, _MOST_FIGURES, _MOST_NAME = 1 << 20, 1000, 300


@dataclass(frozen=True)
class Figure:
    """A number above zero and its noise: the standard deviation of its logarithm, which for small ones is the relative error."""

    value: float
    noise: float


@dataclass(frozen=True)
class Entry:
    """What is recorded of the engine of one target."""

    precision: str
    positions: int
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Move:
    """One figure, then and now. ``outcome``: "same", "worse", "better", "new", "gone" or "not measured"."""

    name: str
    before: float | None
    now: float | None
    noise: float
    outcome: str

    @property
    def worse(self) -> bool:
        """Whether this is a regression; a parity figure or a size that is no longer there is one too."""
        return self.outcome in ("worse", "gone")

    @property
    def change(self) -> float:
        """The logarithm of now over then; nothing where one of them is missing."""
        return 0.0 if self.before is None or self.now is None else math.log(self.now / self.before)

    def in_words(self) -> str:
        """From what to what, by how much, and how many times the noise that is."""
        if self.before is None or self.now is None:
            return f"{self.outcome}: {_number(self.before)} then, {_number(self.now)} now"
        return f"{_number(self.before)} then, {_number(self.now)} now: {self.part()}, {self.times()}"

    def part(self) -> str:
        """The change in percent, without a sign where none is seen; a factor where it is large."""
        if abs(self.change) > math.log(10):
            return f"times {math.exp(self.change):.3g}"
        text = f"{math.expm1(self.change):+.1%}"
        return "0.0%" if float(text[:-1]) == 0 else text

    def times(self) -> str:
        """How many times its noise a figure moved."""
        if self.before is None or self.now is None:
            return ""
        if self.noise == 0:
            return "equal" if abs(self.change) < _EQUAL else "it has no noise"
        return f"{abs(self.change) / self.noise:.1f} times the noise"


def figures_of(report: ParityReport, manifest: Manifest, speeds: Mapping[str, float] | None = None) -> dict[str, float]:
    """Every figure of an engine by its name: parity ratios, its size, and speeds where they were measured."""
    found = {}
    inside: dict[str, list[float]] = {}
    for check in report.checks:
        if not check.sample or not check.noise > 0 or not math.isfinite(check.measured):
            continue
        ratio = max(check.measured / check.noise, 1e-6)
        if check.tap:
            inside.setdefault(check.name.rpartition(", ")[2], []).append(ratio)
        else:
            found[f"error / noise, {check.name.partition(' (')[0]}"] = ratio
    for which, ratios in inside.items():
        found[f"error / noise, values inside, {which}: median of {len(ratios)}"] = statistics.median(ratios)
        found[f"error / noise, values inside, {which}: largest"] = max(ratios)
    found[_SIZE] = float(sum(entry.bytes for name, entry in manifest.files.items() if name not in REPORT_FILES))
    return found | {f"{_SPEED}{name}": value for name, value in (speeds or {}).items()}


def kind_of(name: str) -> str:
    """ "parity", "size" or "speed"."""
    return "size" if name == _SIZE else "speed" if name.startswith(_SPEED) else "parity"


def entry_of(manifest: Manifest, report: ParityReport, runs: Sequence[Mapping[str, float]]) -> Entry:
    """What to record, of one or more runs of `figures_of`. The first run's parity is the value, since the same tokens are run
    again when it is compared; of speeds it is the median."""
    figures = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs if name in run]
        spread = statistics.stdev(map(math.log, values)) if len(values) > 1 else 0.0
        figures[name] = Figure(statistics.median(values) if kind_of(name) == "speed" else first, spread)
    return Entry(manifest.target.precision, _positions(report), figures)


def compare(entry: Entry, now: Mapping[str, float]) -> list[Move]:
    """Every figure then and now, in the order in which they were recorded, new ones last."""
    moves = []
    for name, figure in entry.figures.items():
        if name not in now:
            outcome = "not measured" if kind_of(name) == "speed" else "gone"
            moves.append(Move(name, figure.value, None, figure.noise, outcome))
            continue
        change = math.log(now[name] / figure.value) * (-1 if kind_of(name) == "speed" else 1)
        allowed = max(NOISES * figure.noise, FLOORS[kind_of(name)])
        outcome = "worse" if change > allowed else "better" if change < -allowed else "same"
        moves.append(Move(name, figure.value, now[name], figure.noise, outcome))
    return moves + [Move(name, None, value, 0.0, "new") for name, value in now.items() if name not in entry.figures]


def table(moves: Sequence[Move]) -> str:
    """The moves as lines of text: what got worse first, then what got better, then the rest."""
    order = {"worse": 0, "gone": 0, "better": 1}
    rows = [("figure", "then", "now", "moved", "its noise", "", "")]
    for move in sorted(moves, key=lambda move: order.get(move.outcome, 2)):
        moved = move.part() if move.before is not None and move.now is not None else ""
        noise = f"{move.noise:.1%}" if move.noise else "none"
        rows.append((move.name, _number(move.before), _number(move.now), moved, noise, move.times(), move.outcome))
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, wide, strict=True))
        ).rstrip()
        for row in rows
    )


def read_baseline(path: Path, manifest: Manifest, positions: int | None = None) -> Entry:
    """The recorded entry of an engine's target.

    Raises EngineFileError for a file that is no baseline, and for one of another checkpoint, target or precision.
    """
    data = _read(path)
    known = manifest.digests.get("weights")
    if data["checkpoint"] != known:
        raise _refused(path, "the baseline is of another checkpoint", str(known), data["checkpoint"])
    name = manifest.target.name
    if name not in data["targets"]:
        raise _refused(
            path, "the baseline has nothing of this target", name, ", ".join(list(data["targets"])[:20]) or "no target"
        )
    entry: Entry = data["targets"][name]
    if entry.precision != manifest.target.precision:
        raise _refused(path, "the baseline is of another precision", manifest.target.precision, entry.precision)
    return entry


def check_positions(path: Path, entry: Entry, report: ParityReport) -> None:
    """Raises EngineFileError unless as many positions were compared as when the entry was recorded."""
    if entry.positions != _positions(report):
        raise _refused(
            path,
            "the baseline was recorded on other tokens",
            f"{_positions(report)} positions",
            f"{entry.positions}",
            "Give the same --decode-steps and --text as when it was recorded.",
        )


def write_baseline(path: Path, manifest: Manifest, entry: Entry) -> None:
    """Put an engine's entry into a file, which is made, or keeps its other targets. Appears whole.

    Raises EngineFileError where the file is of another checkpoint or no baseline, BuildError where nothing can be written.
    """
    weights, targets = manifest.digests.get("weights", ""), {}
    if os.path.lexists(path):
        data = _read(path)
        if data["checkpoint"] != weights:
            raise _refused(path, "the baseline is of another checkpoint", weights, data["checkpoint"], "Choose another file.")
        targets = data["targets"]
    targets[manifest.target.name] = entry
    text = json.dumps(
        {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": weights,
            "targets": {
                name: {
                    "precision": entry.precision,
                    "positions": entry.positions,
                    "figures": {
                        figure: {
                            "value": float(f"{found.value:.6g}") if found.value % 1 else int(found.value),
                            "noise": float(f"{found.noise:.3g}"),
                        }
                        for figure, found in entry.figures.items()
                    },
                }
                for name, entry in sorted(targets.items())
            },
        },
        indent=1,
    )
    write_whole(path, (text + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """A file that appears whole or stays as it was. Raises BuildError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except (OSError, ValueError) as error:
        found, remedy = os_trouble(error) if isinstance(error, OSError) else (str(error), "choose another name")
        raise BuildError(f"{path} cannot be written", found=found, remedy=remedy) from error


def _positions(report: ParityReport) -> int:
    return sum(len(sequence.kl) for sequence in report.sequences)


def _read(path: Path) -> dict[str, Any]:
    """A baseline with its entries. Raises EngineFileError for anything else."""
    raw = read_bounded(path, _MOST_BYTES)
    try:
        data = json.loads(raw.decode("utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {data['schema_version']!r:.20}")
        targets = {_name(name): _entry(item) for name, item in _table(data["targets"]).items()}
        return {"checkpoint": _name(data["checkpoint"]), "targets": targets}
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        raise EngineFileError(
            f"{path} is no baseline",
            expected=f"what `ngpt-deploy verify --update-baseline` wrote, schema_version {SCHEMA_VERSION}",
            found=f"{type(error).__name__}: {error}"[:200],
            remedy="Record it again: ngpt-deploy verify ENGINE --checkpoint DIR --baseline FILE --update-baseline.",
        ) from error


def _entry(item: Any) -> Entry:
    figures = {
        _name(name): Figure(_above(figure["value"], 0), _above(figure["noise"], None))
        for name, figure in _table(item["figures"]).items()
    }
    return Entry(_name(item["precision"]), int(_above(item["positions"], 0)), figures)


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > _MOST_FIGURES:
        raise ValueError("no table of names")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_NAME or not value.isprintable():
        raise ValueError("a name that cannot be shown")
    return value


def _above(value: Any, least: int | None) -> float:
    """A finite number above `least`, or from zero."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value >= 0 if least is None else value > least):
        raise ValueError("a number that a figure cannot have")
    if value > 1e18:
        raise ValueError("a number that a figure cannot have")
    return float(value)


def _refused(path: Path, what: str, expected: str, found: str, remedy: str = "") -> EngineFileError:
    return EngineFileError(
        f"{what}: {path}",
        expected=expected[:200],
        found=found[:200],
        remedy=remedy or "Record it with: ngpt-deploy verify ENGINE --checkpoint DIR --baseline FILE --update-baseline.",
    )


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if value < 10_000 else f"{value:.0f}"
