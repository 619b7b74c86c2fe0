#!/usr/bin/env python3
"""Print the table of request options in docs/serving.md, from `triton_repo.interface`, or put it there.

python scripts/interface_table.py            # print
python scripts/interface_table.py --write    # replace the part of docs/serving.md between its two markers
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.generated import print_or_write
from triton_repo.interface import INPUTS, REFUSED, TENSORRT_LLM, Input, Tensor, honoured

DOCUMENT = ROOT / "docs" / "serving.md"
BEGIN = "<!-- begin: scripts/interface_table.py -->\n"
HEAD = """| option | tokens name | text name | type | values | neutral | TensorRT-LLM's backend | what it asks for |
|---|---|---|---|---|---|---|---|
"""
FOREIGN = """
What other servers know by these names is refused by name, unless it asks for nothing. (What is sent over HTTP by a name that is
nowhere in these tables, Triton drops without a word.)

| input | neutral | instead |
|---|---|---|
"""
BETWEEN = """
The model of TensorRT-LLM's PyTorch runtime has these inputs. Triton refuses any other, by name.

| option | `tensorrt_llm` (llmapi) | type | values | what it asks for |
|---|---|---|---|---|
"""


def table() -> str:
    """A row for each input of this project's own models; then those of the model of TensorRT-LLM's PyTorch runtime."""
    ours = [_line(row) for row in INPUTS if row.tokens is not None or row.text is not None]
    theirs = [_short_line(row, row.pytorch) for row in INPUTS if row.pytorch is not None]
    foreign = [f"| `{row.tensor.name}` | {_said(row.neutral)} | {row.remedy} |\n" for row in REFUSED]
    return HEAD + "".join(ours) + FOREIGN + "".join(foreign) + BETWEEN + "".join(theirs)


def _line(row: Input) -> str:
    taken = row.only or row.range
    backend = "yes" if honoured(row, TENSORRT_LLM) else "refused"
    neutral = "" if row.neutral is None else f"{row.neutral}"
    older = ", ".join(f"`{name}`" for name in row.older)
    about = row.about + (f" (also: {older})" if older else "")
    cells = [
        f"`{row.option}`",
        _name(row.tokens),
        _name(row.text),
        _kind(row),
        taken.said if taken else "",
        neutral,
        backend,
        about,
    ]
    return "| " + " | ".join(cells) + " |\n"


def _short_line(row: Input, tensor: Tensor) -> str:
    cells = [
        f"`{row.option}`",
        _name(tensor),
        f"{tensor.dtype} {list(tensor.dims)}",
        row.range.said if row.range else "",
        row.about,
    ]
    return "| " + " | ".join(cells) + " |\n"


def _said(neutral: object) -> str:
    return "" if neutral in (None, "") else f"{neutral}"


def _name(tensor: Tensor | None) -> str:
    return "" if tensor is None else f"`{tensor.name}`"


def _kind(row: Input) -> str:
    kinds = [f"{t.dtype} {list(t.dims)}" for t in (row.tokens, row.text) if t is not None]
    return ", ".join(dict.fromkeys(kinds))


def main() -> None:
    """See the module's text."""
    print_or_write(__doc__, DOCUMENT, BEGIN, table())


if __name__ == "__main__":
    main()
