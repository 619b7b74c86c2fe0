#!/usr/bin/env python3
"""Check everything that needs a GPU, on a machine that has one: one table, and the same rows as JSON.

Needs torch with CUDA, numpy, and a compiler for the kernels (cuda-bindings with nvidia-cuda-nvrtc, or nvcc); transformers and
tensorrt_rtx where they are installed. docs/measurements/METHOD.md says what each number means. Not executed on a CUDA device yet.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.gpu.machine import describe, require_cuda
from scripts.gpu.report import Row, Section, run_sections, table, write_json


def sections(options: argparse.Namespace) -> dict[str, Section]:
    """All sections by name. Their modules are imported when they run, so that one that cannot be imported stops only itself."""

    def kernels() -> Iterable[Row]:
        require_cuda()
        from scripts.gpu import kernels

        return kernels.section()

    def golden() -> Iterable[Row]:
        from scripts.gpu import golden

        return golden.section(ROOT / "tests" / "golden")

    def model() -> Iterable[Row]:
        require_cuda()
        from scripts.gpu import model

        return model.section(options.layers, options.context)

    def rtx() -> Iterable[Row]:
        from scripts.gpu import rtx

        return rtx.section(ROOT / "tests" / "golden", options.layers, options.context)

    return {"kernels": kernels, "golden": golden, "model": model, "rtx": rtx}


def main(arguments: Sequence[str] | None = None, find: Callable[[argparse.Namespace], dict[str, Section]] = sections) -> int:
    """Exit status: 0 when nothing failed and something ran, 1 when a row FAILED, 2 when no section could run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check.json", help="the rows as JSON")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model that is timed (default: the 8B model's 32)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of its prompt and cache (default 2048)")
    parser.add_argument("--only", action="append", metavar="SECTION", help="run this section alone; may be repeated")
    options = parser.parse_args(arguments)
    chosen = find(options)
    if options.only:
        unknown = sorted(set(options.only) - set(chosen))
        if unknown:
            parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in options.only}
    machine = describe()
    rows = run_sections(chosen, tell=lambda text: print(text, file=sys.stderr, flush=True))
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), end="\n\n")
    print(table(rows))
    write_json(options.output, machine, rows)
    print(f"\nwritten to {options.output}")
    if any(row.verdict == "FAILED" for row in rows):
        return 1
    return 2 if all(row.verdict == "skipped" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
