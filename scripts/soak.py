#!/usr/bin/env python3
"""Hold a real server to its word: load, faults, overload and hostile input. Prints a table; --write DIR keeps it as a report.

    python scripts/soak.py --engine build/demo/engine                 # everything, about half an hour on two cores
    python scripts/soak.py --engine build/demo/engine --short         # a minute or two: what CI runs
    python scripts/soak.py --engine build/demo/engine --only load faults

Exit code 1 when an answer that was cut was called a success, a request hung, a slot or memory did not come back, or an error had
no type or showed a path or a traceback. Traffic goes to servers that this script starts on 127.0.0.1, and to nothing else.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.soaking import faults, hostile, load
from scripts.soaking.served import tasks
from triton_repo.package import package_engine
from triton_repo.server import TritonServer

PARTS = ("load", "overload", "hostile", "openai", "faults")


def main() -> int:
    """See the module's text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", type=Path, required=True, help="engine folder with a tokenizer")
    options.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    options.add_argument("--short", action="store_true", help="a few of everything")
    options.add_argument("--streams", type=int, default=100, help="clients at a time")
    options.add_argument("--seconds", type=float, default=300.0, help="of load")
    options.add_argument("--times", type=int, default=20, help="how often each fault is made")
    options.add_argument("--requests", type=int, default=100_000, help="hostile requests")
    options.add_argument("--slots", type=int, default=8)
    options.add_argument("--write", type=Path, metavar="FILE", help="keep the figures as JSON")
    args = options.parse_args()
    if args.short:
        args.streams, args.seconds, args.times, args.requests = 24, 6.0, 1, 1500
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = package_engine(args.engine, Path(scratch) / "models", allow_unverified=True, num_slots=args.slots, threads=1)
        known = tasks(args.engine)
        if {"load", "overload", "hostile"} & set(args.only):
            with TritonServer(models, start_timeout=120, stop_timeout=30) as server:
                if "load" in args.only:
                    show(found, "load", load.load(server, known, streams=args.streams, seconds=args.seconds))
                if "overload" in args.only:
                    show(
                        found,
                        "overload",
                        faults.overload(server, known, streams=300 + args.streams, length=40 if args.short else 300),
                    )
                if "hostile" in args.only:
                    show(found, "hostile", hostile.hostile(server, requests=args.requests))
        if "openai" in args.only:
            show(found, "hostile, by OpenAI's interface", hostile.openai(models, requests=args.requests // 4))
        if "faults" in args.only:
            for fault in faults.FAULTS:
                show(found, fault, faults.fault(models, known, fault, times=args.times, streams=min(args.streams, 48)))
    if args.write is not None:
        args.write.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(good(figures) for figures in found.values()) else 1


def show(found: dict[str, object], part: str, figures: dict[str, object]) -> None:
    """Print the figures of a part as soon as they are there."""
    found[part] = figures
    print(f"== {part} ({time.strftime('%H:%M:%S')}) {'as it should be' if good(figures) else 'NOT AS IT SHOULD BE'}")
    for name, value in figures.items():
        print(f"   {name:32} {value}")
    sys.stdout.flush()


def good(figures: object) -> bool:
    """Whether nothing was found that must not be."""
    assert isinstance(figures, dict)
    never = ("wrong", "hung", "slots held at the end", "untyped", "paths or tracebacks", "not answered afterwards")
    grown = figures.get("memory after, MB", 0) - figures.get("memory before, MB", 0)
    steady = grown <= max(96, 0.1 * figures.get("memory before, MB", 0)) and figures.get("grown in the last quarter, MB", 0) <= 8
    steady = steady and figures.get("grown by a request, the server, KB", 0) <= 16
    return steady and not any(figures.get(name, 0) for name in never)


if __name__ == "__main__":
    sys.exit(main())
