"""What is published of the proof: docs/measurements/mutations.json, and the tables that are made of it."""

import datetime
from pathlib import Path

from engines.parity.gate import MEAN_MULTIPLE
from scripts.generated import END
from tests.mutations.lowerings import LOWERINGS
from tests.mutations.proof import plan
from tests.mutations.table import FAITHFUL, MUTATIONS

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN = "<!-- begin: scripts/mutations.py -->\n"
LETTERS = {"prefill": "P", "decode": "D", "taps": "T", "weights": "W", "numbers": "N"}


def results_of(cells):
    """(mutation, cell, judgement) of every engine, as JSON."""
    found = [
        {
            "mutation": cell.mutation, "checkpoint": cell.checkpoint, "lowering": cell.lowering, "verdict": cell.verdict,
            "effect": _short(cell.effect), "caught_by": list(cell.kinds), "first": cell.named, "taps": bool(cell.taps),
            "right": judgement.right, "said": judgement.said,
        }
        for _mutation, cell, judgement in cells
    ]  # fmt: skip
    return {
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "faults": {each.name: each.fault for each in MUTATIONS},
        "wrong": sum(not each["right"] for each in found),
        "engines": found,
    }


def _short(number):
    return float(f"{number:.3g}") if number == number else None


def missing(results):
    """Engines that the list of faults asks for and the results do not have, and the other way round; faults told otherwise."""
    asked = {(mutation.name, mutation.checkpoint, lowering) for mutation, lowering in plan()}
    have = {(each["mutation"], each["checkpoint"], each["lowering"]) for each in results["engines"]}
    told = {each.name: each.fault for each in MUTATIONS}
    return sorted(asked ^ have) + sorted(set(told.items()) ^ set(results["faults"].items()))


def stale(results, *, write=False):
    """What of the published is not what the results say; with `write` it is then."""
    found = [f"docs/measurements/mutations.json, {each}" for each in missing(results)]
    for name, text in (("parity.md", table(results)), ("measurements/mutations.md", effects(results))):
        document = DOCS / name
        before, rest = document.read_text(encoding="utf-8").split(BEGIN)
        old, after = rest.split(END, 1)
        if old != text:
            found.append(f"docs/{name}")
            if write:
                document.write_text(before + BEGIN + text + END + after, encoding="utf-8")
    return found


def table(results):
    """A row a fault, a column a lowering: which checks failed, and whether the first tap is the right one."""
    cells = {(each["mutation"], each["lowering"]): each for each in results["engines"]}
    lines = _head("fault", "where", *LOWERINGS)
    lines.append(_row("none: a right engine, on each checkpoint", "", *(_right(results, name) for name in LOWERINGS)))
    for each in MUTATIONS:
        lines.append(_row(each.fault, f"`{each.first}`" if each.first else "", *(_cell(cells, each, name) for name in LOWERINGS)))
    return "\n".join(lines) + "\n\n" + _counts(results) + "\n"


def _right(results, name):
    found = [e["verdict"] for e in results["engines"] if e["mutation"] == FAITHFUL.name and e["lowering"] == name]
    return f"pass ({len(found)})" if set(found) == {"pass"} else "**FAIL**"


def _cell(cells, mutation, name):
    cell = cells.get((mutation.name, name))
    if cell is None:
        return ""
    if cell["verdict"] == "pass":
        return _times(cell["effect"]) if cell["right"] else "**PASSED**"
    letters = "".join(LETTERS[kind] for kind in cell["caught_by"])
    return letters if cell["right"] else f"{letters}, **{cell['said']}**"


def _times(effect):
    return f"{effect:.2g} x" if effect else "none"


def _counts(results):
    engines = [each for each in results["engines"] if each["mutation"] != FAITHFUL.name]
    caught = [each for each in engines if each["verdict"] == "fail"]
    shown = {each.name for each in MUTATIONS if each.first is not None}
    named = [each for each in caught if each["taps"] and each["right"] and each["mutation"] in shown]
    right = len(results["engines"]) - len(engines)
    return (
        f"{len(MUTATIONS)} faults, {len(engines)} engines with one: {len(caught)} failed. {len(named)} of these have their fault in "
        f"values that can be seen, and the first that was named is the right one; for the others none was named. "
        f"{len(engines) - len(caught)} passed, whose logits moved by "
        f"{max(each['effect'] for each in engines if each['verdict'] == 'pass'):.2g} times the noise at most: the gate lets "
        f"{MEAN_MULTIPLE:g} times through. {right} right engines passed."
    )


def effects(results):
    """A row a fault, a column a lowering: by how many times the noise it moved the logits."""
    cells = {(each["mutation"], each["lowering"]): each for each in results["engines"]}
    lines = [f"Made on {results['made']}.", "", *_head("name", "checkpoint", *LOWERINGS)]
    for each in MUTATIONS:
        found = [cells.get((each.name, name)) for name in LOWERINGS]
        shown = ["" if cell is None else "NaN" if cell["effect"] is None else f"{cell['effect']:.3g}" for cell in found]
        lines.append(_row(f"`{each.name}`", each.checkpoint, *shown))
    without = [f"`{each.name}`: {each.without}" for each in MUTATIONS if each.without]
    return "\n".join(lines) + "\n\nNot in every lowering: " + "; ".join(without) + ".\n"


def _head(*names):
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells):
    return "| " + " | ".join(cells) + " |"
