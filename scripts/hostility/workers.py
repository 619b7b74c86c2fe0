"""Processes that read spoiled files, one after another, and are watched: who hangs or dies is replaced, and the file noted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import resource
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.hostility.mutations import clear
from scripts.hostility.readers import READERS, Goods, typed

Case = tuple[str, int]
"""A reader's name and a number: with the seed, all that a case is made of."""
MOST_MEMORY = 6 << 30
"""Bytes of data that a worker may have; beyond that its allocations fail."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended: "accepted", "typed", "untyped", "hung" or "died". what: the class of the error, or more where there
    should have been none. peak: bytes that its reader took at most."""

    case: Case
    end: str
    what: str
    seconds: float = 0.0
    peak: int = 0


def run(goods: Goods, scratch: Path, cases: Sequence[Case], seed: int, *, workers: int, limit: float) -> Iterator[Outcome]:
    """The outcome of every case, in no order. limit: seconds after which a reader hangs."""
    watched = selectors.DefaultSelector()
    crew = [_Worker(goods, scratch / str(index), cases[index::workers], seed) for index in range(workers)]
    for worker in crew:
        worker.start()
        watched.register(worker.pipe, selectors.EVENT_READ, worker)
    while watched.get_map():
        for key, _ in watched.select(timeout=0.2):
            worker = key.data
            yield from worker.told()
            if worker.ended:
                watched.unregister(key.fileobj)
                if (lost := worker.buried()) is not None:
                    yield lost
                if worker.todo:
                    worker.start()
                    watched.register(worker.pipe, selectors.EVENT_READ, worker)
        for worker in crew:
            if time.monotonic() - worker.heard > limit and not worker.ended:
                worker.kill()


class _Worker:
    """A forked process and the pipe on which it tells each outcome in a line."""

    def __init__(self, goods: Goods, scratch: Path, cases: Sequence[Case], seed: int) -> None:
        self._goods, self._scratch, self._seed = goods, scratch, seed
        self.todo = list(reversed(cases))
        self.pipe, self._process, self._rest, self._hung = -1, 0, b"", False
        self.ended, self.heard = True, time.monotonic()

    def start(self) -> None:
        """Go on with what is left."""
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._process = os.fork()
        if self._process == 0:
            try:
                os.close(read)
                _work(self._goods, self._scratch, list(reversed(self.todo)), self._seed, write)
            finally:
                os._exit(0)
        os.close(write)
        self.pipe, self.ended, self.heard, self._rest, self._hung = read, False, time.monotonic(), b"", False

    def told(self) -> Iterator[Outcome]:
        """Outcomes that have arrived."""
        data = os.read(self.pipe, 1 << 16)
        self.ended, self.heard = not data, time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            reader, number, *rest = json.loads(line)
            self.todo.pop()
            yield Outcome((reader, number), *rest)

    def kill(self) -> None:
        """Its reader hangs."""
        self._hung = True
        self.heard = time.monotonic()
        os.kill(self._process, signal.SIGKILL)

    def buried(self) -> Outcome | None:
        """After its end: the case that it did not come back from."""
        os.close(self.pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        if not self.todo:
            return None
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome(self.todo.pop(), "hung" if self._hung else "died", how)


def _work(goods: Goods, scratch: Path, cases: Iterable[Case], seed: int, pipe: int) -> None:
    import torch

    torch.set_num_threads(1)  # other threads of the parent are not here
    scratch.mkdir(parents=True, exist_ok=True)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    warnings.simplefilter("ignore")
    logging.disable()
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for case in cases:
        end, what, seconds, peak = one(goods, scratch / "case", case, seed)
        os.write(pipe, json.dumps([*case, end, what, seconds, peak]).encode() + b"\n")


def one(goods: Goods, folder: Path, case: Case, seed: int) -> tuple[str, str, float, int]:
    """Make a case and read it: how it ended, the error's class or text, seconds, and bytes at most."""
    make(goods, folder, case, seed)
    before = _reset_peak()
    start = time.monotonic()
    try:
        READERS[case[0]].read(goods, folder)
        end, what = "accepted", ""
    except Exception as error:
        good = typed(error)
        end, what = "typed" if good else "untyped", type(error).__name__
        if not good:
            what = f"{what}: {ascii(str(error))[:300]}"
    return end, what, round(time.monotonic() - start, 4), max(0, _status("VmHWM") - before)


def make(goods: Goods, folder: Path, case: Case, seed: int) -> None:
    """The files of a case, in `folder` and nowhere else."""
    clear(folder)
    READERS[case[0]].write(goods, folder, random.Random(f"{seed} {case[0]} {case[1]}"))


def _reset_peak() -> int:
    """Forget the largest memory of this process so far; returns what it has now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) << 10
    return 0


def import_all(goods: Goods, scratch: Path) -> None:
    """Read a case of each kind in this process, so that forks need not import anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable()
        for reader in READERS:
            if reader != "ONNX graph":  # which leaves threads behind, and may take the process with it
                one(goods, scratch / "warm", (reader, 0), 0)
    logging.disable(logging.NOTSET)
