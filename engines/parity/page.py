"""The report as one self-contained page: what each part of it shows. `templates/` has how it looks.

No script, nothing from the network, no style attribute: the page's policy allows its one style sheet by its digest, and a host
that forbids even that still shows everything.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.parity import pictures
from engines.parity.gate import Check
from engines.parity.patterns import GROUPS, clues, first_divergence, grouped, strays, worst_sequence
from engines.parity.steps import STEPS, before, part_of_layer, step_of
from engines.parity.words import excess, in_words, label, number, share
from export.taps import LAYER_TAPS
from ngpt.errors import missing_package

if TYPE_CHECKING:
    from jinja2 import Environment

    from engines.parity.report import ParityReport

_SHOWN_ELSEWHERE = ("verdict", "engine", "failed_checks", "not_applicable", "first_divergence", "decided")


@dataclass(frozen=True)
class Cell:
    """Of the grid of layers and sub-steps: how much of its limit a tap's angle takes, in words of a style and as a number."""

    style: str
    text: str


@dataclass(frozen=True)
class Next:
    """Where to look after a failure. ``tap``: the first value that leaves its limit, or ""; ``previous``: the one before it."""

    tap: str
    previous: str | None
    what: str
    suspects: str
    sequence: int
    script: str


def render(report: ParityReport) -> str:
    """The page. Raises MissingPackageError without jinja2, which torch brings."""
    templates = _templates()
    style = templates.get_template("parity.css.j2").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page = templates.get_template("parity.html.j2").render(
        report=report,
        style=style,
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        words=in_words(report),
        facts=_facts(report),
        clues=list(clues(report)) if report.failures else [],
        next=_next(report, templates) if report.failures else None,
        failures=grouped(report.failures),
        undecided=[check for check in report.checks if not check.sample],
        groups=grouped(report.checks),
        titles=GROUPS,
        columns=[name for name in LAYER_TAPS if any(part_of_layer(check.tap)[1] == name for check in report.checks)],
        grid=_grid(report.checks),
        drift=pictures.drift(report),
        curves=pictures.curves(report),
        strip=pictures.strip(report),
        norms=pictures.norms(report.invariants),
        scales=pictures.scales(report.invariants),
        outside=[item for item in report.invariants if not item.layers],
        zeros=[(item.name, sum(item.zeros)) for item in report.invariants if sum(item.zeros)],
        strays={stray.index: stray for stray in strays(report)},
        rows=list(_rows(report.summary)),
    )
    return page + "\n"


def _templates() -> Environment:
    """Every value that a template prints is escaped: names of engines, files and checks come from outside."""
    try:
        import jinja2
    except ImportError as error:
        raise missing_package("the parity page needs jinja2", "torch") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("engines.parity"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "ratio": _ratio, "excess": excess, "label": label}
    return environment


def _ratio(check: Check) -> str:
    return f"{check.measured / check.noise:.2f}" if check.noise > 0 and math.isfinite(check.measured) else ""


def _facts(report: ParityReport) -> list[tuple[str, str, str]]:
    """(what, the number, what to compare it with) for the head of the page."""
    found = report.summary
    facts = [("checks decided", str(sum(check.sample > 0 for check in report.checks)), f"of {len(report.checks)}")]
    for key, what, noise in (
        ("max_abs_logit_error", "largest logit error", "max_abs_logit_noise"),
        ("kl_mean", "mean KL, nat", "kl_mean_noise"),
    ):
        if key in found:
            facts.append((what, number(found[key]), f"noise {number(found.get(noise))}"))
    if isinstance(found.get("top1_agreement"), float):
        wide = found.get("stable_positions")
        facts.append(
            (
                "same first choice",
                f"{found['top1_agreement']:.1%}",
                f"decidable at {wide:.1%}" if isinstance(wide, float) else "of positions",
            )
        )
    return facts


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in summary.items():
        if key in _SHOWN_ELSEWHERE:
            continue
        if isinstance(value, dict):
            rows += [(f"{label(str(key))}: {label(str(part))}", number(item)) for part, item in value.items()]
        else:
            rows.append((label(str(key)), number(value)))
    return rows


def _next(report: ParityReport, templates: Environment) -> Next | None:
    worst = worst_sequence(report, first_divergence(report))
    if worst is None:
        return None
    tap = first_divergence(report)
    order = list(dict.fromkeys(check.tap for check in report.checks if check.tap))
    previous = before(tap, order) if tap else None
    step = step_of(tap)
    script = templates.get_template("reproduce.py.j2").render(
        tap=tap, taps=[ascii(name) for name in (previous, tap) if name], worst=worst
    )
    return Next(tap, previous, step.what, step.suspects, worst, script.strip())


def _grid(checks: Sequence[Check]) -> list[tuple[str, dict[str, Cell]]]:
    """(layer, sub-step -> cell) for every layer: of a tap's two checks the one that takes more of its limit."""
    rows: dict[int, dict[str, Cell]] = {}
    worst: dict[str, Check] = {}
    for check in checks:
        if check.tap and (check.tap not in worst or not share(check) <= share(worst[check.tap])):
            worst[check.tap] = check
    for tap, check in worst.items():
        layer, part = part_of_layer(tap)
        if layer is not None and part in STEPS:
            style = "none" if not check.sample else "over" if check.failed else "near" if share(check) > 0.5 else "within"
            rows.setdefault(layer, {})[part] = Cell(style, excess(check) or ("not finite" if check.failed else "none"))
    return [(str(layer), rows[layer]) for layer in sorted(rows)]
