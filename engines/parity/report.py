"""`ParityReport`: the verdict, its numbers, and writing them as JSON and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.parity.gate import Check, verdict_of
from engines.parity.invariants import Invariant
from engines.parity.page import render
from engines.runtime.errors import EngineFileError
from ngpt.atomic_folder import replace_file
from ngpt.errors import BuildError, MissingPackageError

JSON_FILE = "parity.json"
HTML_FILE = "parity.html"
SCHEMA_VERSION = 2
"""Of parity.json, which `parity.schema.json` describes. Version 1 had no outcomes, samples, tokens and invariants."""


@dataclass(frozen=True)
class SequenceResult:
    """Per-position curves of one sequence; lists have one number per token (angles: one per tap, the mean).

    ``margin``: the reference's gap between its two largest logits; above ``stable_margin`` the engine must choose alike.
    ``other_choice``: the positions where it chose otherwise. ``tokens``: what both were given.
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
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ParityReport:
    """The outcome. ``verdict`` is "pass" or "fail"; ``summary`` has the headline numbers (JSON-ready); ``subject`` says which
    files it is about (`engines.parity.subject`), None for an engine that was no folder; ``invariants`` what
    the checkpoint's weights look like."""

    verdict: str
    summary: dict[str, Any]
    checks: list[Check]
    sequences: list[SequenceResult] = field(default_factory=list)
    subject: dict[str, Any] | None = None
    invariants: list[Invariant] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParityReport:
        """The report that `to_dict` wrote, from anywhere. Raises EngineFileError for one that it cannot have written."""
        try:
            checks = [_made(Check, item) for item in data["checks"]]
            sequences = [_made(SequenceResult, item) for item in data["sequences"]]
            invariants = [_made(Invariant, item) for item in data["invariants"]]
            for sequence in sequences:
                per_position = (sequence.kl_noise, sequence.max_abs, sequence.max_abs_noise, sequence.margin, sequence.tokens)
                _same_length(sequence.kl, *per_position)
                _within(len(sequence.kl), sequence.prompt_length - 1, *sequence.other_choice)
            for invariant in invariants:
                _same_length(invariant.mean, invariant.low, invariant.high, invariant.zeros)
                _same_length(invariant.mean, invariant.layers or invariant.mean[:1])
            report = cls(data["verdict"], dict(data["summary"]), checks, sequences, dict(data["subject"]), invariants)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, ArithmeticError) as error:
            raise _no_report(f"{type(error).__name__}: {error}") from error
        try:
            report.to_html().encode()
        except MissingPackageError:
            raise
        except Exception as error:  # whatever the page makes of numbers that cannot be drawn and text that cannot be written
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
                "invariants": [dataclasses.asdict(invariant) for invariant in self.invariants],
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
        """The page: verdict, what to do next, pictures, every check. Raises MissingPackageError without jinja2."""
        return render(self)


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


def _made(kind: Any, item: Mapping[str, Any]) -> Any:
    """A dataclass of the report from its JSON. Raises KeyError, TypeError or ValueError."""
    return kind(**{f.name: _typed(f.type, item[f.name]) for f in dataclasses.fields(kind)})


def _same_length(first: Sequence[Any], *others: Sequence[Any]) -> None:
    if any(len(other) != len(first) for other in others):
        raise ValueError("lists of different lengths that belong together")


def _within(length: int, *positions: int) -> None:
    if any(not 0 <= position < length for position in positions):
        raise ValueError("a position that the sequence does not have")


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
