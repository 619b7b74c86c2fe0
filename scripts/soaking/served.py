"""What is served, and what each request must be answered with."""

from __future__ import annotations

import re
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from engines import load_engine
from triton_repo.client import token_tensors
from triton_repo.server import TritonServer

PROMPTS = ("def main():\n", "import os\n\n", "class Stack:\n", "for item in", "x", "while True:\n    if value is None:\n        ")
LENGTHS = (1, 8, 40, 120, 300)


@dataclass(frozen=True)
class Task:
    """A prompt, how many tokens are asked for, and the text and tokens that an undisturbed engine makes of it."""

    prompt: str
    ids: tuple[int, ...]
    length: int
    text: str
    tokens: tuple[int, ...]


def tasks(engine_folder: Path, lengths: tuple[int, ...] = LENGTHS) -> list[Task]:
    """Every prompt at every length, each answered alone."""
    made = []
    with load_engine(engine_folder, num_slots=1, threads=1) as engine:
        for prompt in PROMPTS:
            ids = engine.tokenizer.encode(prompt)
            for length in lengths:
                tokens = engine.generate([ids], length, ignore_eos=True)[0]
                made.append(
                    Task(prompt, tuple(ids), length, engine.generate_text(prompt, length, ignore_eos=True), tuple(tokens))
                )
    return made


def metrics(server: TritonServer) -> dict[str, float]:
    """This project's metrics, summed over their labels."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith("ngpt_"):
            name = line.split("{")[0]
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found


def processes(server: TritonServer) -> dict[int, str]:
    """The server and the processes of its models: what each was started with, by its number."""
    root = server.pid
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            if root in (pid, parent):
                found[pid] = (stat.parent / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return found


def model_process(server: TritonServer, model: str = "ensemble") -> int:
    """The process of a model's first instance."""
    return next(pid for pid, line in processes(server).items() if f"/{model}/" in line and "backend_stub" in line)


def memory(server: TritonServer) -> int:
    """Bytes of private memory of the server and its models' processes together."""
    return sum(map(private_bytes, processes(server)))


def memory_of_models(server: TritonServer) -> int:
    """The same without the server's own process."""
    return sum(private_bytes(pid) for pid in processes(server) if pid != server.pid)


def private_bytes(pid: int | None) -> int:
    """Bytes of memory that a process shares with no other."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", text, re.MULTILINE)) << 10


def stop_tensors() -> dict[str, object]:
    """A request to stop the one that has its id."""
    import numpy as np

    return {**token_tensors([0], 1, (), (), {}), "stop": np.asarray([[True]])}
