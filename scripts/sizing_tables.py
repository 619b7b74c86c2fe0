#!/usr/bin/env python3
"""Print the tables of docs/sizing.md, or put them there. Arithmetic alone: nothing is measured or built.

python scripts/sizing_tables.py            # print
python scripts/sizing_tables.py --write    # replace the part of docs/sizing.md between its two markers
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engines.capacity import plan_capacity, read_spec
from engines.target import load_target, target_names
from ngpt.errors import TargetError
from ngpt.spec import NGPTSpec
from scripts.generated import print_or_write

DOCUMENT = ROOT / "docs" / "sizing.md"
BEGIN = "<!-- begin: scripts/sizing_tables.py -->\n"
CONCURRENCY, CONTEXT = 16, 8192
LARGE = {
    "model_type": "ngpt",
    "hidden_size": 8192,
    "intermediate_size": 43008,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
COLUMNS = (
    "target | precision | GPUs | weights GB/GPU | cache GB/GPU | sequences that fit | tokens/s each, at most | in all, at most"
)
HEAD = f"| {COLUMNS} |\n{'|---' * 8}|\n"


def table(spec: NGPTSpec, precisions: tuple[str, ...]) -> str:
    """A row for each card and precision: the smallest tensor-parallel degree that holds the load.

    A card's TensorRT-LLM target has the same memory and bandwidth, and would repeat its rows.
    """
    rows = []
    for name in target_names():
        for precision in precisions:
            target = load_target(name)
            if target.gpu is None or target.runtime == "tensorrt_llm" or precision not in target.precisions:
                continue
            try:
                found = plan_capacity(spec, load_target(name, precision), CONCURRENCY, CONTEXT)
            except TargetError:
                rows.append(f"| {name} | {precision} | none | | | | | |")
                continue
            sizes = f"{found.memory.weights / 1e9:.2f} | {found.cache / 1e9:.2f} | {found.most_sequences}"
            rates = f"{found.rate:.0f} | {found.rate * found.concurrency:.0f}"
            rows.append(f"| {name} | {precision} | {found.ranks} | {sizes} | {rates} |")
    return HEAD + "\n".join(rows) + "\n"


def tables() -> str:
    """Both tables as Markdown."""
    small, large = read_spec(None), NGPTSpec.from_config(LARGE)
    load = f"{CONCURRENCY} sequences of {CONTEXT} tokens"
    return (
        f"## The 8B model, {load}\n\n{table(small, ('fp16', 'int8', 'int4'))}\n"
        f"## A 70B shape, {load}\n\n80 layers, hidden 8192, MLP 43008, 64/8 heads of 128: no such checkpoint is known to us.\n\n"
        f"{table(large, ('fp16', 'fp8', 'int4'))}"
    )


def main() -> None:
    """See the module's text."""
    print_or_write(__doc__, DOCUMENT, BEGIN, tables())


if __name__ == "__main__":
    main()
