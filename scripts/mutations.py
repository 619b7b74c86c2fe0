#!/usr/bin/env python3
"""Mutation proof of the parity gate: engines with one fault each, through every lowering that runs here, and what the gate says.

python scripts/mutations.py                                    # all of it; docs/measurements/mutations.json
python scripts/mutations.py --only scale-divided --lowering "onnx portable" --output build/mutations.json
python scripts/mutations.py --write                            # put the tables of mutations.json into the guides
python scripts/mutations.py --check                            # do the guides and the file fit each other and the list of faults?

Needs a checkout (tests/mutations has the faults and tests/doubles what plays TensorRT), and no GPU. An engine without a fault
must pass, one with a fault must fail, and the first tap that the report names must be the one where the fault is. Exit status:
0 where all that holds, 1 where it does not, 2 for wrong arguments.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "docs" / "measurements" / "mutations.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="this fault alone; may be repeated")
    parser.add_argument("--lowering", action="append", metavar="NAME", help="this lowering alone; may be repeated")
    parser.add_argument("--output", type=Path, help=f"the results as JSON (of a whole run: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--write", action="store_true", help="put the tables into the guides; nothing is run")
    parser.add_argument("--check", action="store_true", help="say whether the guides are up to date; nothing is run")
    parser.add_argument("--list", action="store_true", help="print the names of faults and lowerings; nothing is run")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from tests.mutations import publish
    from tests.mutations.lowerings import LOWERINGS
    from tests.mutations.table import MUTATIONS

    names = {"--only": [each.name for each in MUTATIONS], "--lowering": list(LOWERINGS)}
    for option, asked in (("--only", options.only), ("--lowering", options.lowering)):
        if unknown := sorted(set(asked or ()) - set(names[option])):
            parser.error(f"{option} {unknown[0]}: there are {', '.join(names[option])}")
    if options.list:
        print("\n".join(f"{each.name:24} {each.fault}" for each in MUTATIONS), *LOWERINGS, sep="\n")
        return 0
    if options.write or options.check:
        return _guides(publish, write=options.write)
    whole = not options.only and not options.lowering
    output = options.output or (RESULTS if whole else None)
    results = _run(options.only, options.lowering)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"written to {output}")
    return 1 if results["wrong"] else 0


def _guides(publish: Any, *, write: bool) -> int:
    stale = publish.stale(json.loads(RESULTS.read_text(encoding="utf-8")), write=write)
    for what in stale:
        print(f"{'written' if write else 'stale'}: {what}")
    return 0 if write or not stale else 1


def _run(only: list[str] | None, lowerings: list[str] | None) -> dict[str, Any]:
    """Run the cells that were asked for, a line each; returns what is published."""
    import torch

    from tests.mutations.proof import judged, plan, proof
    from tests.mutations.publish import results_of

    torch.set_num_threads(1)
    cells, started = [], time.monotonic()
    work = plan(only, lowerings)
    with proof() as running:
        for number, (mutation, lowering) in enumerate(work):
            cell = running.cell(mutation, lowering)
            found = judged(mutation, cell)
            cells.append((mutation, cell, found))
            spent = time.monotonic() - started
            left = spent / (number + 1) * (len(work) - number - 1)
            said = found.said if found.right else f"WRONG: {found.said}"
            print(f"[{number + 1}/{len(work)}, {left:.0f} s left] {lowering}: {mutation.name}: {said}", flush=True)
    wrong = [f"{cell.lowering}: {mutation.name}: {found.said}" for mutation, cell, found in cells if not found.right]
    print(f"{len(cells)} engines in {time.monotonic() - started:.0f} s, {len(wrong)} judged wrongly")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    results: dict[str, Any] = results_of(cells)
    return results


if __name__ == "__main__":
    sys.exit(main())
