"""doctor: what is here, and what a build or a server would still need. Imports nothing heavy: whatever may hang or abort is asked
in processes of its own."""

import argparse
import json
import sys
from pathlib import Path

from engines.target import AUTO, Target
from scripts.commands.building import KV_CACHE
from scripts.commands.options import Bar, Command, positive
from scripts.doctoring.findings import Finding
from scripts.terminal import plain

_SHOWN = {"good": "ok", "missing": "missing", "unfit": "unfit", "unknown": "unknown"}

_PROBES = 24  # at most, for the bar


def add_doctor(command: Command, targets: list[Target]) -> None:
    """`ngpt-deploy doctor`."""
    doctor = command(
        "doctor",
        _doctor,
        "Say what this machine has and what a build or a server would still need, each missing thing with the command that "
        "brings it. Exit code 2 if what was asked for cannot be done; without --target and --serve that is inspect, plan and "
        "package alone.",
    )
    names = ", ".join(target.name for target in targets)
    doctor.add_argument("--target", help=f"to build for: a name, the path of a target's file, or {AUTO}: {names}")
    doctor.add_argument(
        "--checkpoint",
        help="hold memory and disk against what its build takes: a Hugging Face directory, ckpt.pt, or a config.json",
    )
    doctor.add_argument("--precision", help="another one that the target offers")
    doctor.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto", help=KV_CACHE)
    doctor.add_argument("--tp", type=positive, default=1, help="cards a layer is divided among (TensorRT-LLM targets)")
    doctor.add_argument("--pp", type=positive, default=1, help="cards the layers are divided among (TensorRT-LLM targets)")
    doctor.add_argument("--output", type=Path, default=Path(), help="where the engine would be written")
    doctor.add_argument("--serve", action="store_true", help="look at what serving with Triton on this machine needs")
    doctor.add_argument("--quick", action="store_true", help="look up versions alone; do not try to import the packages")
    doctor.add_argument("--json", action="store_true", help="print JSON alone: every finding, and whether it can be done")


def _doctor(args: argparse.Namespace) -> int:
    from engines.device import detect, target_for
    from engines.target import DEFAULT, load_target, with_kv_cache
    from scripts.doctoring.examination import Asked, examine

    name = args.target or (DEFAULT if args.checkpoint else "")
    if name == AUTO:
        device = detect()
        name = DEFAULT if device is None else target_for(device).name
    target = with_kv_cache(load_target(name, args.precision), args.kv_cache) if name else None
    asked = Asked(
        target, name, args.checkpoint, args.precision, args.kv_cache, args.tp, args.pp, args.output, args.serve, not args.quick
    )
    found: list[Finding] = []
    with Bar() as bar:
        for number, (what, look) in enumerate(examine(asked)):
            bar(what, number / _PROBES)
            try:
                found += look()
            except Exception as error:
                found.append(Finding("machine", what, "unknown", f"{type(error).__name__}: {error}"[:300]))
    stops = [finding for finding in found if finding.stops]
    if args.json:
        data = {"asked": asked.words, "possible": not stops, "findings": [finding.to_dict() for finding in found]}
        print(json.dumps(data, indent=2))
    else:
        for line in _table(found, asked.words, sys.stdout.isatty()):
            print(line)
    return 2 if stops else 0


def _table(found: list[Finding], words: str, colours: bool) -> list[str]:
    lines: list[str] = []
    width = max(len(finding.name) for finding in found)
    for group in dict.fromkeys(finding.group for finding in found):
        lines += [*([""] if lines else []), group]
        for finding in (each for each in found if each.group == group):
            state = _SHOWN[finding.state].upper() if finding.stops else _SHOWN[finding.state]
            wanted = f"  (wanted: {plain(finding.wanted, 300)})" if finding.wanted else ""
            line = f"  {state:8} {finding.name:{width}}  {plain(finding.found, 300)}{wanted}"
            lines.append(_coloured(line, finding) if colours else line)
            if finding.remedy and finding.state != "good":
                lines.append(f"  {'':8} {'':{width}}  -> {plain(finding.remedy, 300)}")
    stops = [finding.name for finding in found if finding.stops]
    last = (
        f"cannot {words}: {', '.join(stops)}"
        if stops
        else f"nothing that was found keeps this machine from what is asked: {words}"
    )
    return [*lines, "", last]


def _coloured(line: str, finding: Finding) -> str:
    number = 31 if finding.stops else 32 if finding.state == "good" else 33
    return f"\x1b[{number}m{line[:10]}\x1b[0m{line[10:]}"
