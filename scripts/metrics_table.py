#!/usr/bin/env python3
"""Print the tables of docs/metrics.md, from the templates and the frontend that publish the metrics, or put them there.

python scripts/metrics_table.py            # print
python scripts/metrics_table.py --write    # replace the part of docs/metrics.md between its two markers
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.generated import print_or_write

DOCUMENT = ROOT / "docs" / "metrics.md"
BEGIN = "<!-- begin: scripts/metrics_table.py -->\n"
HEAD = "| metric | type | labels | meaning |\n|---|---|---|---|\n"
LABELS = ("model", "version", "model_instance")
FRONTEND = "\nThose of [OpenAI's frontend](openai.md), on its own port and path `/metrics`:\n\n"


def table() -> str:
    """A row for each metric of the served model, then for each of the frontend."""
    templates = ROOT / "triton_repo" / "templates"
    rows = [
        _row(name, kind, LABELS, text) for name, (_, kind, text) in _constant(templates / "engine/model.py", "METRICS").items()
    ]
    name, text = _constant(templates / "shared/python_backend.py", "FIRST_TOKEN")
    rows.append(_row(name, "histogram", (*LABELS, "le"), f"{text}, noted when a request ends; of servers that have histograms"))
    return HEAD + "".join(rows) + FRONTEND + HEAD + "".join(_of_the_frontend())


def _of_the_frontend() -> list[str]:
    from triton_repo.openai.metrics import Metrics

    metrics = Metrics()
    metrics.begin("x").end(200)  # labels are seen where there is a value
    text = metrics.text().decode()
    texts = dict(re.findall(r"^# HELP (\w+) (.*)$", text, re.M))
    kinds = {name: kind for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.M) if not name.endswith("_created")}
    found = []
    for name, kind in kinds.items():
        sample = re.search(rf"^{name}(?:_bucket)?\{{(.*?)\}} ", text, re.M)
        found.append(_row(name, kind, re.findall(r'(\w+)="', sample[1]) if sample else (), texts[name]))
    return found


def _constant(path: Path, name: str) -> Any:
    """What a file says: the templates import what only a server has."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == [name]:
            return ast.literal_eval(statement.value)
    raise LookupError(f"{path} has no {name}")


def _row(name: str, kind: str, labels: tuple[str, ...] | list[str], text: str) -> str:
    return f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {text[0].lower()}{text[1:]} |\n"


def main() -> None:
    """See the module's text."""
    print_or_write(__doc__, DOCUMENT, BEGIN, table())


if __name__ == "__main__":
    main()
