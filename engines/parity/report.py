"""`ParityReport`: the verdict, its numbers, and writing them as JSON and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.parity.gate import Check
from engines.parity.svg import COLORS, Chart, Line
from ngpt.errors import BuildError, missing_package

if TYPE_CHECKING:
    from jinja2 import Environment

JSON_FILE = "parity.json"
HTML_FILE = "parity.html"
SCHEMA_VERSION = 1
MAX_FAILURES = 8  # named at the top of the page; the table of checks has all of them
MAX_MARKS = 24  # of positions with another first choice, in one plot


@dataclass(frozen=True)
class SequenceResult:
    """Per-position curves of one sequence; lists have one number per token (angles: one per tap, the mean).

    ``margin``: the reference's gap between its two largest logits; above ``stable_margin`` the engine must choose alike.
    ``other_choice``: the positions where it chose otherwise.
    """

    name: str
    prompt_length: int
    kl: list[float]
    kl_noise: list[float]
    max_abs: list[float]
    max_abs_noise: list[float]
    margin: list[float]
    stable_margin: float
    other_choice: list[int]
    angles: dict[str, float]
    angles_noise: dict[str, float]


@dataclass(frozen=True)
class ParityReport:
    """The outcome. ``verdict`` is "pass" or "fail"; ``summary`` has the headline numbers (JSON-ready)."""

    verdict: str
    summary: dict[str, Any]
    checks: list[Check]
    sequences: list[SequenceResult] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        """The checks that were decided and did not pass."""
        return [check for check in self.checks if check.failed]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that JSON cannot hold (NaN, infinity) become strings."""
        return _jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "verdict": self.verdict,
                "summary": self.summary,
                "checks": [
                    dataclasses.asdict(check) | {"outcome": check.outcome, "passed": check.passed} for check in self.checks
                ],
                "sequences": [dataclasses.asdict(sequence) for sequence in self.sequences],
            }
        )

    def write(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write parity.json and parity.html into ``folder`` (made if absent). Raises `BuildError` on I/O failure."""
        out = Path(folder)
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        try:
            out.mkdir(parents=True, exist_ok=True)
            _replace(out / JSON_FILE, text)
            _replace(out / HTML_FILE, self.to_html())
        except OSError as error:
            raise BuildError(f"cannot write the parity report to {out}", found=str(error)) from error
        return out / JSON_FILE, out / HTML_FILE

    def to_html(self) -> str:
        """The page, from ``templates/parity.html.j2``: verdict, how to read it, plots, every check.

        Raises MissingPackageError without jinja2, which torch brings.
        """
        page = _templates().get_template("parity.html.j2")
        return page.render(report=self, failures=self.failures[:MAX_FAILURES], charts=_charts(self.sequences, self.checks)) + "\n"


def _templates() -> Environment:
    """Every value that a template prints is escaped: names of engines, files and checks come from outside."""
    try:
        import jinja2
    except ImportError as error:
        raise missing_package("the parity page needs jinja2", "torch") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("engines.parity"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _show, "ratio": _ratio}
    return environment


def _charts(sequences: Sequence[SequenceResult], checks: Sequence[Check]) -> list[Chart]:
    charts = []
    taps = {
        check.name.removeprefix("angle at ").removesuffix(", mean"): check
        for check in checks
        if check.name.startswith("angle at ") and check.name.endswith(", mean")
    }
    if taps:
        charts.append(
            Chart(
                "Angle between hidden states, layer by layer",
                "tap: " + ", ".join(list(taps)[:3]) + (", ..." if len(taps) > 3 else ""),
                "radians, mean over positions",
                [
                    Line("engine", [c.measured for c in taps.values()], COLORS["engine"]),
                    Line("noise", [c.noise for c in taps.values()], COLORS["noise"]),
                    Line("limit", [c.limit for c in taps.values()], COLORS["limit"], dashed=True),
                ],
            )
        )
    for sequence in sequences:
        mark = [(sequence.prompt_length, "decode")]
        for title, ours, noise in (
            ("KL(reference || engine)", sequence.kl, sequence.kl_noise),
            ("Largest logit error", sequence.max_abs, sequence.max_abs_noise),
        ):
            lines = [Line("engine", ours, COLORS["engine"]), Line("noise", noise, COLORS["noise"])]
            unit = "nats" if title.startswith("KL") else "logit"
            charts.append(Chart(f"{title}: {sequence.name}", "position", unit, lines, mark))
        limit = [sequence.stable_margin] * len(sequence.margin)
        lines = [
            Line("margin", sequence.margin, COLORS["noise"]),
            Line("must agree above", limit, COLORS["limit"], dashed=True),
        ]
        differs = [(position, "differs") for position in sequence.other_choice[:MAX_MARKS]]
        charts.append(Chart(f"Margin of the first choice: {sequence.name}", "position", "logit", lines, mark + differs))
    return charts


def _ratio(check: Check) -> str:
    return f"{check.measured / check.noise:.2f}" if check.noise > 0 and math.isfinite(check.measured) else ""


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    return "none" if value is None else str(value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
