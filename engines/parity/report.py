"""`ParityReport`: the verdict, its numbers, and writing them as JSON and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.parity.gate import Check
from engines.parity.svg import COLORS, Line, chart
from ngpt.errors import BuildError

JSON_FILE = "parity.json"
HTML_FILE = "parity.html"
SCHEMA_VERSION = 1
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
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that JSON cannot hold (NaN, infinity) become strings."""
        return _jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "verdict": self.verdict,
                "summary": self.summary,
                "checks": [dataclasses.asdict(check) | {"passed": check.passed} for check in self.checks],
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
        """The page: verdict, how to read it, plots, every check."""
        rows = "".join(_row(check) for check in self.checks)
        facts = "".join(
            f"<tr><td>{html.escape(key.replace('_', ' '))}</td><td>{html.escape(_show(value))}</td></tr>"
            for key, value in self.summary.items()
            if key != "verdict"
        )
        worst = "".join(f"<li>{html.escape(_sentence(check))}</li>" for check in self.failures[:8])
        plots = "".join(f"<figure>{plot}</figure>" for plot in _plots(self.sequences, self.checks))
        return _PAGE.format(
            verdict=self.verdict.upper(),
            css_class=self.verdict,
            engine=html.escape(str(self.summary.get("engine", ""))),
            failures=f"<p>Failed:</p><ul>{worst}</ul>" if worst else "<p>Every check is within its limit.</p>",
            facts=facts,
            plots=plots,
            rows=rows,
        )


def _plots(sequences: Sequence[SequenceResult], checks: Sequence[Check]) -> list[str]:
    plots = []
    taps = {
        check.name.removeprefix("angle at ").removesuffix(", mean"): check
        for check in checks
        if check.name.startswith("angle at ") and check.name.endswith(", mean")
    }
    if taps:
        plots.append(
            chart(
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
            plots.append(chart(f"{title}: {sequence.name}", "position", unit, lines, mark))
        limit = [sequence.stable_margin] * len(sequence.margin)
        lines = [
            Line("margin", sequence.margin, COLORS["noise"]),
            Line("must agree above", limit, COLORS["limit"], dashed=True),
        ]
        differs = [(position, "differs") for position in sequence.other_choice[:MAX_MARKS]]
        plots.append(chart(f"Margin of the first choice: {sequence.name}", "position", "logit", lines, mark + differs))
    return plots


def _row(check: Check) -> str:
    cells = (check.name, _show(check.measured), _show(check.noise), _show(check.limit), check.unit)
    ratio = f"{check.measured / check.noise:.2f}" if check.noise > 0 and math.isfinite(check.measured) else ""
    body = "".join(f"<td>{html.escape(cell)}</td>" for cell in (*cells, ratio))
    state = "pass" if check.passed else "fail"
    return f'<tr>{body}<td class="{state}">{state}</td></tr>'


def _sentence(check: Check) -> str:
    return f"{check.name}: {_show(check.measured)} {check.unit}, limit {_show(check.limit)}, noise {_show(check.noise)}"


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


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Parity: {verdict}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111 }}
.verdict {{ font-size: 1.6rem; font-weight: 700 }} .pass {{ color: #15803d }} .fail {{ color: #b91c1c }}
table {{ border-collapse: collapse; width: 100%; margin: 1rem 0 }}
td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .5rem; text-align: left; font-variant-numeric: tabular-nums }}
figure {{ margin: 1rem 0 }} svg {{ width: 100%; height: auto; font: 11px sans-serif }}
svg .grid {{ stroke: #e5e7eb }} svg .mark {{ stroke: #9ca3af; stroke-dasharray: 2 3 }} svg .title {{ font-weight: 700 }}
</style></head><body>
<h1>Parity of {engine}</h1>
<p class="verdict {css_class}">{verdict}</p>
{failures}
<h2>How to read this</h2>
<p>The engine and the PyTorch model were fed the same tokens, so errors cannot compound through different
continuations. <b>Engine</b> curves show how far the engine is from the wide reference; <b>noise</b> curves show how far
PyTorch itself is from that reference in the engine's precision. A faithful engine lies on or near the noise. The
limit is a fixed multiple of the noise: 4 for means, 8 for the worst position. In nGPT every hidden state has
unit norm, so the angle between two of them is the natural distance: look for the first layer at which the engine
leaves the noise. The first choice must agree wherever the reference's margin lies above the dashed line. For a quantised engine the reference holds the same quantised weights; what the quantisation itself
costs, against the original weights, is listed as quantisation loss; its noise is the loss that random errors of the
format's step cause, and it may be at most twice that.</p>
<table>{facts}</table>
<h2>Plots</h2>
{plots}
<h2>Checks</h2>
<table><tr><th>check</th><th>measured</th><th>noise</th><th>limit</th><th>unit</th><th>measured / noise</th><th></th></tr>
{rows}</table>
</body></html>
"""
