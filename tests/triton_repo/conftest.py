"""One real Triton server for the whole folder, serving the example's engine; and the same engine in this process."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines import load_engine
from triton_repo.package import package_engine
from triton_repo.server import TritonServer

SLOTS = 4
PROMPT = "def main():\n"


@dataclass(frozen=True)
class Served:
    """The server, and the engine that it serves."""

    server: TritonServer
    engine: object

    @property
    def url(self) -> str:
        return self.server.grpc_url

    def metrics(self) -> dict[str, float]:
        """Our own Prometheus metrics by name."""
        with urllib.request.urlopen(f"http://{self.server.metrics_url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("ngpt_")}

    def wait_for(self, condition: Callable[[dict[str, float]], bool], seconds: float = 5.0) -> dict[str, float]:
        """Metrics as soon as they meet the condition; they are published ten times a second."""
        deadline = time.monotonic() + seconds
        while not condition(now := self.metrics()):
            assert time.monotonic() < deadline, f"metrics did not get there: {now}"
            time.sleep(0.05)
        return now


@pytest.fixture(scope="session")
def repository(tiny_engine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The build's own tests check the verdict; what is served does not depend on it.
    output = tmp_path_factory.mktemp("models") / "repository"
    return package_engine(tiny_engine_folder, output, num_slots=SLOTS, threads=1, max_queue=32)


@pytest.fixture(scope="session")
def served(repository: Path, tiny_engine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with load_engine(tiny_engine_folder, num_slots=SLOTS, threads=1) as engine:
        with TritonServer(repository, log_path=log, start_timeout=90) as server:
            yield Served(server, engine)
