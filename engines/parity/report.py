"""`ParityReport`: the verdict, its numbers, and writing them as JSON and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.parity.gate import Check, verdict_of
from engines.parity.svg import COLORS, Chart, Line
from engines.runtime.errors import EngineFileError
from ngpt.atomic_folder import replace_file
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
    """The outcome. ``verdict`` is "pass" or "fail"; ``summary`` has the headline numbers (JSON-ready); ``subject`` says which
    files it is about (`engines.parity.subject`), None for an engine that was no folder."""

    verdict: str
    summary: dict[str, Any]
    checks: list[Check]
    sequences: list[SequenceResult] = field(default_factory=list)
    subject: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParityReport:
        """The report that `to_dict` wrote, from anywhere. Raises EngineFileError for one that it cannot have written."""
        try:
            checks = [
                Check(**{f.name: _typed(f.type, item[f.name]) for f in dataclasses.fields(Check)}) for item in data["checks"]
            ]
            sequences = [
                SequenceResult(**{f.name: _typed(f.type, item[f.name]) for f in dataclasses.fields(SequenceResult)})
                for item in data["sequences"]
            ]
            report = cls(data["verdict"], dict(data["summary"]), checks, sequences, dict(data["subject"]))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _no_report(f"{type(error).__name__}: {error}") from error
        if report.verdict != verdict_of(checks) or report.summary.get("verdict") != report.verdict:
            raise _no_report(f"the verdict {report.verdict!r:.20} over checks that say {verdict_of(checks)}")
        return report

    @property
    def failures(self) -> list[Check]:
        """The checks that were decided and did not pass."""
        return [check for check in self.checks if check.failed]

    def headlines(self) -> dict[str, Any]:
        """The summary, JSON-ready."""
        return dict(_jsonable(self.summary))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that JSON cannot hold (NaN, infinity) become strings."""
        return _jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "verdict": self.verdict,
                "subject": self.subject,
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
        text, page = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", self.to_html()
        try:
            out.mkdir(parents=True, exist_ok=True)
            replace_file(out / JSON_FILE, text)
            replace_file(out / HTML_FILE, page)
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
    taps = {check.tap: check for check in checks if check.tap and check.name.endswith(", mean")}
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


_NUMBERS = {"nan", "inf", "-inf"}


def _typed(kind: Any, value: Any) -> Any:
    """A field of the report by its annotation; numbers that JSON cannot hold are spelled as text. Raises ValueError."""
    if kind == "float":
        return _number(value)
    if kind == "list[float]":
        return [_number(item) for item in _of(list, value)]
    if kind == "dict[str, float]":
        return {_of(str, key): _number(item) for key, item in _of(dict, value).items()}
    if kind == "list[int]":
        return [_of(int, item) for item in _of(list, value)]
    return _of({"str": str, "int": int}[kind], value)


def _number(value: Any) -> float:
    return float(value) if value in _NUMBERS else float(_of((int, float), value))


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"a value of type {type(value).__name__}")
    return value


def _no_report(found: str) -> EngineFileError:
    return EngineFileError(
        "this is not a parity report of this version",
        expected="a parity.json that `ngpt-deploy verify` wrote",
        found=found[:300],
        remedy="Verify the engine with this version, and bring that report.",
    )
