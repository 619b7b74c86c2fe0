#!/usr/bin/env python3
"""The whole pipeline on the example: build, verify, package, serve with a real Triton server, stream over gRPC, stop.

Everything it makes lies under build/demo; run it again and it starts afresh.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from scripts.cli import main as ngpt_deploy

WORK = ROOT / "build" / "demo"
PROMPT = "class Stack:\n    def push(self, item):"
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 40, "seed": 1}  # greedy text of so small a model soon repeats itself


def step(title: str) -> None:
    """Announce a step."""
    print(f"\n== {title}", flush=True)


def main() -> int:
    """Run every step; returns the exit code."""
    shutil.rmtree(WORK, ignore_errors=True)
    engine, models = WORK / "engine", WORK / "models"

    step("build the engine and verify it against PyTorch")
    code = ngpt_deploy(
        ["build", "--checkpoint", str(ROOT / "examples/ngpt-tiny"), "--target", "cpu-int8", "--output", str(engine)]
    )
    if code:
        return code

    step("package it as a Triton model repository")
    code = ngpt_deploy(["package", str(engine), "--output", str(models)])
    if code:
        return code

    from triton_repo.client import stream_text
    from triton_repo.server import TritonServer

    step("serve it with tritonserver on 127.0.0.1")
    with TritonServer(models, log_path=WORK / "server.log") as server:
        print(f"gRPC 127.0.0.1:{server.grpc_port}  HTTP 127.0.0.1:{server.http_port}")
        step("stream a completion over gRPC")
        print(PROMPT, end="", flush=True)
        start, pieces, first = time.perf_counter(), 0, 0.0
        for piece in stream_text(f"127.0.0.1:{server.grpc_port}", PROMPT, max_tokens=96, **SAMPLING):
            first = first or time.perf_counter() - start
            pieces += 1
            print(piece, end="", flush=True)
        seconds = time.perf_counter() - start
    parity = json.loads((engine / "manifest.json").read_text(encoding="utf-8"))["parity"]
    step("done; the server is stopped")
    print(f"parity verdict   {parity['verdict']}")
    print(f"parity report    {engine / parity['html']}")
    print(
        f"speed            {pieces / seconds:.0f} pieces of text (about one a token) per second through gRPC, "
        f"the first after {1000 * first:.0f} ms"
    )
    return 0 if parity["verdict"] == "pass" else 3


if __name__ == "__main__":
    sys.exit(main())
