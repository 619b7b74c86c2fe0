"""Rows, the table, the JSON, and sections that cannot take each other down."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["ok", "below goal", "FAILED", "measured", "skipped"]


@dataclass(frozen=True)
class Row:
    """One line of the table. `value` is None where there is no number; `verdict` "measured" judges nothing."""

    section: str
    what: str
    value: float | None = None
    unit: str = ""
    verdict: Verdict = "measured"
    note: str = ""


class Unavailable(Exception):
    """A section cannot run on this machine; the message says what is missing."""


Section = Callable[[], Iterable[Row]]


def run_sections(sections: dict[str, Section], tell: Callable[[str], None] = print) -> list[Row]:
    """Run each section and collect its rows. Whatever one raises becomes a row of its own, after the rows it had yielded."""
    rows: list[Row] = []
    for name, section in sections.items():
        tell(f"{name} ...")
        start = time.perf_counter()
        try:
            for row in section():
                rows.append(row)
        except Unavailable as error:
            rows.append(Row(name, "not run", verdict="skipped", note=str(error)))
        except Exception as error:
            tell(traceback.format_exc())
            rows.append(Row(name, "stopped", verdict="FAILED", note=f"{type(error).__name__}: {error}".replace("\n", " ")[:300]))
        tell(f"{name}: {time.perf_counter() - start:.1f} s")
    return rows


def table(rows: Iterable[Row]) -> str:
    """The rows in aligned columns."""
    lines = [("section", "what", "value", "unit", "verdict", "note")]
    lines += [(r.section, r.what, _number(r.value), r.unit, r.verdict, r.note) for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    rule = tuple("-" * width for width in widths) + ("----",)
    body = [lines[0], rule, *lines[1:]]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[5]]).rstrip() for line in body
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def write_json(path: Path, machine: dict[str, Any], rows: Iterable[Row]) -> None:
    """`machine` and the rows, for comparison between runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": 1, "machine": machine, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
