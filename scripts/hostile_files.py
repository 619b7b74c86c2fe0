#!/usr/bin/env python3
"""Give every reader of files from outside files that mean no good, and count how that ends. Prints a table.

    python scripts/hostile_files.py                              # 100,000 files, some minutes on two cores
    python scripts/hostile_files.py --files 500                  # a minute: what CI runs is about as many
    python scripts/hostile_files.py --case "config.json" 4711    # one of them again, with its traceback

Each file is a good one that was spoiled: bits turned, an end missing, counts that are huge, names that lead elsewhere, keys
twice, other types, NaN, levels without end, archives that grow, pickles that call; or a link, a folder, a pipe, a device in
its place. What is spoiled and how follows from the seed, the reader and the file's number alone.

A file is accepted or refused by an error of ours, one that can be shown. Exit code 1 for any other error, for a reader that
hangs or dies, and for one that takes more memory than it may.
"""

import argparse
import collections
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from scripts.hostility.readers import READERS, Goods
from scripts.hostility.workers import Outcome, import_all, make, run

MOST_PEAK = 512 << 20
"""Bytes that the reader of a file of some kilobytes may take."""


def main() -> int:
    """See the module's text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--files", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--readers", nargs="+", choices=list(READERS), default=list(READERS), metavar="READER", help=", ".join(READERS)
    )
    options.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--limit", type=float, default=30.0, help="seconds after which a reader hangs")
    options.add_argument("--case", nargs=2, metavar=("READER", "NUMBER"), help="make one file again, and show what reads it")
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        (goods_folder := Path(scratch) / "goods").mkdir()
        goods = Goods.make(goods_folder)
        if args.case is not None:
            return again(goods, args.case[0], int(args.case[1]), args.seed)
        import_all(goods, Path(scratch))
        share = sum(READERS[reader].share for reader in args.readers)
        cases = [
            (reader, number)
            for reader in args.readers
            for number in range(max(1, round(args.files * READERS[reader].share / share)))
        ]
        start, outcomes = time.monotonic(), []
        for outcome in run(goods, Path(scratch), cases, args.seed, workers=args.workers, limit=args.limit):
            outcomes.append(outcome)
            if len(outcomes) % 2000 == 0:
                print(f"{len(outcomes)} of {len(cases)}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(table(outcomes))
    print(f"\n{len(outcomes)} files in {time.monotonic() - start:.0f} s, seed {args.seed}")
    wrong = [outcome for outcome in outcomes if not good(outcome)]
    for outcome in sorted(wrong, key=lambda outcome: outcome.what)[:40]:
        print(f"{outcome.end}: --case {outcome.case[0]!r} {outcome.case[1]}: {outcome.what}, {outcome.peak / 1e6:.0f} MB")
    return 1 if wrong or len(outcomes) != len(cases) else 0


def good(outcome: Outcome) -> bool:
    """Whether a case ended as it must."""
    return outcome.end in ("accepted", "typed") and outcome.peak <= MOST_PEAK


def again(goods: Goods, reader: str, number: int, seed: int) -> int:
    """One case, its files kept, and how its reader ends."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    make(goods, folder, (reader, number), seed)
    print(f"{folder}: {sorted(path.name for path in folder.rglob('*'))}")
    try:
        READERS[reader].read(goods, folder)
        print("accepted")
    except Exception:
        traceback.print_exc()
    return 0


def table(outcomes: list[Outcome]) -> str:
    """In Markdown, a row a reader."""
    lines = [
        "| reader | files | accepted | refused | untyped | hung | died | slowest, s | most memory, MB | most frequent errors |"
    ]
    lines.append("|---" * 10 + "|")
    for reader in [*dict.fromkeys(outcome.case[0] for outcome in outcomes), None]:
        mine = [outcome for outcome in outcomes if reader in (None, outcome.case[0])]
        ends = collections.Counter(outcome.end for outcome in mine)
        kinds = collections.Counter(outcome.what for outcome in mine if outcome.end == "typed")
        often = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(3)) if reader else f"{len(kinds)} classes"
        slowest, most = max(outcome.seconds for outcome in mine), max(outcome.peak for outcome in mine) / 1e6
        counts = " | ".join(f"{ends[end]:,}" for end in ("accepted", "typed", "untyped", "hung", "died"))
        lines.append(f"| {reader or 'all'} | {len(mine):,} | {counts} | {slowest:.2f} | {most:.0f} | {often} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
