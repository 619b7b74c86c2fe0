#!/usr/bin/env python3
"""Kill builds at random moments, by SIGKILL and SIGTERM, and look at what is left. Prints a table.

    python scripts/killed_builds.py                      # 200 kills, about ten minutes on one core
    python scripts/killed_builds.py --kills 12 --forks   # what CI runs is about as much

Each way of building is run once to its end, which gives its time and the bytes that are right. Then builds are killed at a
moment drawn evenly from that time. After each kill, whatever is under the output's name must be whole, and so must every entry
of the store; after SIGTERM no working folder may be left. After one to four kills in the same place a build runs to its end
there: it must succeed, leave nothing beside it, and give the right bytes.

Most builds are forks of this process, so that the time is spent on building and not on imports; every tenth is a process of its
own. Weights lie in a file of their own, as those of large models do. Exit code 1 when anything was not as it must be.
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import engines.backends.onnx
import engines.parity.verify  # noqa: F401  (forks need not import it again)
from engines.resume import SUFFIX as RESUME
from engines.runtime.errors import ServingError
from engines.runtime.manifest import MANIFEST_NAME, read_manifest, verify_files
from engines.runtime.verdict import REPORT_FILES
from engines.store import Store
from ngpt.atomic_folder import SUFFIX as PARTIAL
from ngpt.errors import NGPTDeployError
from scripts.cli import main as command

ONNX, TRTLLM = ("--target", "cpu-int4"), ("--target", "h100-trtllm", "--tp", "2", "--pp", "2")
QUICK = "--no-verify"
WAYS = {
    "ONNX": (*ONNX, QUICK),
    "ONNX, verified": ONNX,
    "ONNX, --resume": (*ONNX, QUICK, "--resume"),
    "ONNX, --store": (*ONNX, "--store", "{}/store"),
    "ONNX, --store --resume": (*ONNX, QUICK, "--store", "{}/store", "--resume"),
    "TensorRT-LLM": TRTLLM,
    "TensorRT-LLM, --resume": (*TRTLLM, "--resume"),
    "TensorRT-LLM, --store": (*TRTLLM, "--store", "{}/store", "--resume"),
}
VERIFIED = ("ONNX, verified", "ONNX, --store")
LEFT = ("nothing", "working folder", "to be continued", "engine without verdict", "engine with verdict", "converted checkpoint")
_OWN_PROCESS = """
import sys
import engines.backends.onnx
engines.backends.onnx.EXTERNAL_DATA_FROM = 0
from scripts.cli import main
sys.exit(main(sys.argv[1:]))
"""
_VERDICT = (*REPORT_FILES, MANIFEST_NAME)


@dataclass
class Found:
    """Of one way: kills by signal, what they left, builds that ran to their end afterwards, and what must not be."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    left: collections.Counter[str] = field(default_factory=collections.Counter)
    completed: int = 0
    wrong: list[str] = field(default_factory=list)


def main() -> int:
    """See the module's text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=200)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "ngpt-tiny")
    options.add_argument("--verified", type=Path, default=ROOT / "tests" / "golden" / "gqa", help="checkpoint of verified builds")
    options.add_argument("--forks", action="store_true", help="no processes of their own: quicker")
    options.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help="; ".join(WAYS))
    args = options.parse_args()
    os.environ["PATH"] = os.defpath  # without trtllm-build: conversions are what is killed
    engines.backends.onnx.EXTERNAL_DATA_FROM = 0
    torch.set_num_threads(1)
    start, all_found = time.monotonic(), {}
    for arguments in (ONNX, (*TRTLLM, "--resume")):  # everything is imported before the first fork
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(None):
            command(["build", "--checkpoint", str(args.verified), *arguments, "--output", f"{scratch}/engine"])
    for index, way in enumerate(args.ways):
        share = args.kills // len(args.ways) + (index < args.kills % len(args.ways))
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = args.verified if way in VERIFIED else args.checkpoint
            all_found[way] = kill(way, checkpoint, Path(scratch), share, random.Random(f"{args.seed} {way}"), args.forks)
        print(f"{way}: {share} kills, {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(table(all_found))
    wrong = [f"{way}: {text}" for way, found in all_found.items() for text in found.wrong]
    print("\n".join(wrong))
    return 1 if wrong else 0


def kill(way: str, checkpoint: Path, scratch: Path, times: int, pick: random.Random, forks: bool) -> Found:
    """Kill so many builds of one way, and look."""
    found, right = Found(), scratch / "right"
    arguments = ["build", "--checkpoint", str(checkpoint.absolute()), *WAYS[way], "--output", "{}/engine"]
    durations, whole = {}, {}
    for own in (False,) if forks else (False, True):
        place = right / str(own)
        place.mkdir(parents=True)
        began = time.monotonic()
        assert wait(started(arguments, place, own)) == 0, (place / "output").read_text()
        durations[own] = time.monotonic() - began
        whole = contents(place / "engine")
    place, pending = scratch / "0", 0
    while sum(found.kills.values()) < times:
        place.mkdir(exist_ok=True)
        number, own = pick.choice((signal.SIGKILL, signal.SIGTERM)), not forks and pick.random() < 0.1
        before = working(place)
        process = started(arguments, place, own)
        time.sleep(pick.uniform(0.0, durations[own]))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
        code = wait(process)
        if code == 0 or (number == signal.SIGKILL and code != -signal.SIGKILL):
            found.wrong += [] if code == 0 else [f"exit code {code} before it was killed"]
            place = fresh(place)
            pending = 0
            continue  # it was over
        if number == signal.SIGTERM and code not in (128 + signal.SIGTERM, -signal.SIGTERM):
            found.wrong.append(f"exit code {code} after SIGTERM: {(place / 'output').read_text()[-300:]}")
        found.kills[signal.Signals(number).name] += 1
        pending += 1
        found.left[left(place, whole, found, number, before)] += 1
        if (place / "engine").exists() or pending == 4 or pick.random() < 0.4:
            complete(arguments, place, whole, found)
            place, pending = fresh(place), 0
    if pending:
        complete(arguments, place, whole, found)
    return found


def started(arguments: list[str], place: Path, own: bool) -> int:
    """The id of a process that builds in `place`: of its own, or a fork of this one. What it says goes to place/output."""
    words = [word.replace("{}", str(place)) for word in arguments]
    with (place / "output").open("ab") as output:
        if own:
            return subprocess.Popen([sys.executable, "-c", _OWN_PROCESS, *words], cwd=ROOT, stdout=output, stderr=output).pid
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = command(words)
        finally:
            os._exit(code)


def wait(process: int) -> int:
    """The exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def fresh(place: Path) -> Path:
    """Another place; the old one goes."""
    shutil.rmtree(place)
    return place.with_name(str(int(place.name) + 1))


def contents(engine: Path) -> dict[str, bytes]:
    """Every file's bytes but those that a verdict writes and that say when it was."""
    files = {path.relative_to(engine).as_posix(): path for path in engine.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in _VERDICT}


def working(place: Path) -> set[Path]:
    """The working folders in a place."""
    return set(place.rglob(f".*{PARTIAL}"))


def left(place: Path, whole: dict[str, bytes], found: Found, number: int, before: AbstractSet[Path] = frozenset()) -> str:
    """What a kill left, in a word; what must not be goes to `found.wrong`. before: working folders of those killed earlier,
    which a build that is stopped before it writes does not sweep yet."""
    state = ""
    for engine in engines_in(place):
        try:
            state = state_of(engine, whole)
        except (NGPTDeployError, ServingError, OSError, AssertionError) as error:
            found.wrong.append(f"half an engine at {engine.relative_to(place)}: {type(error).__name__}: {error}")
            state = "HALF AN ENGINE"
    for key in (store := Store(place / "store")).all_keys() if (place / "store").is_dir() else ():
        try:
            store.check(store.read(key))
        except (NGPTDeployError, ServingError, OSError) as error:
            found.wrong.append(f"half an entry of the store: {error}")
    partial = working(place)
    if number == signal.SIGTERM and (new := partial - before):
        found.wrong.append(f"SIGTERM left {min(new).relative_to(place)}")
    if state:
        return state
    if any(folder for folder in place.rglob(f".*{RESUME}") if (folder / "journal").exists()):
        return "to be continued"
    return "working folder" if partial else "nothing"


def engines_in(place: Path) -> Iterator[Path]:
    """Whatever stands under an engine's name: the store's, and the output."""
    if (place / "store").is_dir():
        for key in Store(place / "store").all_keys():
            yield place / "store" / key / "engine"
    if os.path.lexists(place / "engine"):
        yield place / "engine"


def state_of(engine: Path, whole: dict[str, bytes]) -> str:
    """What a whole engine is. Raises for a half one."""
    assert contents(engine) == whole, "not the bytes of an uninterrupted build"
    if not (engine / MANIFEST_NAME).exists():
        return "converted checkpoint"
    manifest = read_manifest(engine)
    verify_files(engine, manifest)
    return "engine without verdict" if manifest.parity is None else "engine with verdict"


def complete(arguments: list[str], place: Path, whole: dict[str, bytes], found: Found) -> None:
    """A build runs to its end where others were killed, sweeps, and gives the right bytes."""
    if (place / "engine").exists():  # of a build that was killed after it had published
        shutil.rmtree(place / "engine")
    code = wait(started(arguments, place, False))
    found.completed += 1
    if code:
        found.wrong.append(f"a build after kills ended with {code}: {(place / 'output').read_text()[-500:]}")
        return
    beside = [path for path in place.rglob("*") if path.name.endswith((PARTIAL, RESUME, f"{RESUME}.lock"))]
    if beside or contents(place / "engine") != whole:
        found.wrong.append(f"a build after kills left {[path.name for path in beside]}, or other bytes")
    left(place, whole, found, signal.SIGTERM)


def table(all_found: dict[str, Found]) -> str:
    """In Markdown."""
    columns = [state for state in LEFT if any(found.left[state] for found in all_found.values())]
    lines = ["| build | SIGKILL | SIGTERM | " + " | ".join(columns) + " | completed afterwards | not as it must be |"]
    lines.append("|---" * (len(columns) + 5) + "|")
    total = Found()
    for way, found in all_found.items():
        lines.append(_row(way, found, columns))
        total.kills += found.kills
        total.left += found.left
        total.completed += found.completed
        total.wrong += found.wrong
    return "\n".join([*lines, _row("all", total, columns)])


def _row(way: str, found: Found, columns: list[str]) -> str:
    numbers = [found.kills["SIGKILL"], found.kills["SIGTERM"], *(found.left[state] for state in columns)]
    return f"| {way} | " + " | ".join(map(str, [*numbers, found.completed, len(found.wrong)])) + " |"


if __name__ == "__main__":
    sys.exit(main())
