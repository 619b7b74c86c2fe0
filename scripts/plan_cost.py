#!/usr/bin/env python3
"""What building a TensorRT-RTX plan costs: seconds, memory and plan size per layer of the 8B shape, and for the whole model.

Random weights, one and then several layers; the difference is the cost of a layer, the rest is the cost of everything else
(with a vocabulary of 4096; the two real tables are added by their size). Needs no GPU. Each build is a process of its own.

    python scripts/plan_cost.py --target rtx-5090 --layers 1 3
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WHOLE = 32
VOCABULARY, REAL_VOCABULARY, HIDDEN = 4096, 131072, 4096


def write_checkpoint(folder: Path, layers: int) -> None:
    """A checkpoint of the 8B model's layer shape with random weights, bfloat16."""
    import torch

    from ngpt import NGPTConfig, NGPTForCausalLM

    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # half the memory while the weights are drawn
    try:
        NGPTForCausalLM(NGPTConfig(num_hidden_layers=layers, vocab_size=VOCABULARY)).save_pretrained(folder)
    finally:
        torch.set_default_dtype(usual)


class Peak(threading.Thread):
    """The most anonymous memory this process has held: pages of files, which the system may drop, do not count."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
            self.bytes = max(self.bytes, int(line.split()[1]) << 10)


def worker(checkpoint: Path, target: str, precision: str | None) -> None:
    """Build once; prints one line of JSON."""
    from engines.backends.tensorrt import build_plan
    from engines.target import load_target
    from export.lowerings.tensorrt.library import load_library
    from export.weights import DeployedWeights
    from ngpt.checkpoint import open_checkpoint
    from ngpt.weights import Weights

    chosen = load_target(target, precision)
    library = load_library(chosen.runtime)
    peak = Peak()
    peak.start()
    with open_checkpoint(checkpoint) as opened, tempfile.TemporaryDirectory(dir=checkpoint) as folder:
        start = time.perf_counter()
        weights = DeployedWeights(Weights(opened), arithmetic=chosen.precision.arithmetic)
        size = build_plan(weights, chosen, library, Path(folder) / "model.engine")
        seconds = time.perf_counter() - start
    peak.done.set()
    peak.join()
    print(json.dumps({"seconds": seconds, "anonymous_bytes": peak.bytes, "plan_bytes": size}))


def measure(target: str, precision: str | None, layers: list[int]) -> list[dict[str, Any]]:
    """One row per layer count, and the projection to the whole model as the last."""
    from engines.target import load_target

    rows = []
    for count in layers:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), count)
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", folder, "--target", target]
            command += ["--precision", precision] if precision else []
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append({"layers": count} | json.loads(answer.splitlines()[-1]))
    first, last = rows[0], rows[-1]
    span = last["layers"] - first["layers"]
    whole: dict[str, Any] = {"layers": WHOLE, "projected": True}
    for key in ("seconds", "anonymous_bytes", "plan_bytes"):
        per_layer = (last[key] - first[key]) / span
        whole[key] = first[key] + per_layer * (WHOLE - first["layers"])
    # The rows of the embedding table and of the head beyond those that were built.
    numbers = load_target(target, precision).precision
    whole["plan_bytes"] += sum(kind.bytes(REAL_VOCABULARY - VOCABULARY, HIDDEN) for kind in (numbers.head, numbers.embedding))
    return [*rows, whole]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="rtx-5090", help="a tensorrt_rtx target (default rtx-5090)")
    parser.add_argument("--precision", help="another one the target offers")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3], help="layer counts to build (default 1 3)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.target, args.precision)
    if len(set(args.layers)) < 2:
        parser.error("--layers needs two different counts: the cost of a layer is their difference")
    print(f"{'layers':>10} {'seconds':>9} {'anonymous memory, GB':>22} {'plan, GB':>9}")
    for row in measure(args.target, args.precision, sorted(args.layers)):
        name = f"{row['layers']}" + (" (proj.)" if row.get("projected") else "")
        print(f"{name:>10} {row['seconds']:9.1f} {row['anonymous_bytes'] / 1e9:22.2f} {row['plan_bytes'] / 1e9:9.2f}")
    return None


if __name__ == "__main__":
    main()
