#!/usr/bin/env python3
"""Decode and prefill speed of the engines against their peers, as ratios measured in one run.

Each contender is a process of its own that stays alive; rounds are interleaved (A B C, A B C, ...), so that a slow spell of the
machine hits all alike, and medians are compared. PyTorch is the base line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PROMPT_TOKENS, NEW_TOKENS = 192, 128
TARGETS = ("cpu-fp32", "cpu-int8", "cpu-int4", "onnx-portable")


def _prompt(vocabulary: int) -> list[int]:
    return [3 + (i * 7919) % (vocabulary - 3) for i in range(PROMPT_TOKENS)]


def _torch(folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    import torch
    from transformers import AutoModelForCausalLM

    import ngpt  # noqa: F401

    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([_prompt(model.config.vocab_size)])
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda: model.generate(ids, max_new_tokens=1, **options), lambda: model.generate(
        ids, max_new_tokens=NEW_TOKENS, **options
    )


def _engine(folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    from engines import load_engine

    engine = load_engine(folder, num_slots=1)
    ids = _prompt(engine.manifest.model.vocab_size)
    return (
        lambda: engine.generate([ids], max_new_tokens=1, ignore_eos=True),
        lambda: engine.generate([ids], max_new_tokens=NEW_TOKENS, ignore_eos=True),
    )


def _genai(folder: Path) -> tuple[Callable[[], object], Callable[[], object]]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    ids = _prompt(vocabulary)

    def run(count: int) -> None:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(min_length=len(ids) + count, max_length=len(ids) + count, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens([ids])
        while not generator.is_done():
            generator.generate_next_token()

    return lambda: run(1), lambda: run(NEW_TOKENS)


def worker(kind: str, folder: Path) -> None:
    """Load once, then answer each line on stdin with the seconds of one prefill and one whole generation."""
    prefill, whole = {"torch": _torch, "engine": _engine, "genai": _genai}[kind](folder)
    prefill(), whole()
    for _ in sys.stdin:
        times = []
        for function in (prefill, whole):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def run(checkpoint: Path, rounds: int) -> list[dict[str, Any]]:
    """Build what is to be measured, measure it interleaved, print the table; returns its rows."""
    from engines.build import build_engine

    with tempfile.TemporaryDirectory() as scratch:
        contenders = {"PyTorch float32, eager": ("torch", checkpoint)}
        for target in TARGETS:
            folder = build_engine(checkpoint, target, Path(scratch) / target, verify=False)
            contenders[target] = ("engine", folder)
            if target in ("cpu-fp32", "cpu-int8"):
                contenders[f"onnxruntime-genai on {target}"] = ("genai", folder)
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        processes = {
            name: subprocess.Popen([*command, kind, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for name, (kind, folder) in contenders.items()
        }
        times: dict[str, list[list[float]]] = {name: [] for name in contenders}
        try:
            for _ in range(rounds + 1):  # the first round also waits for loading and warms up; it is dropped
                for name, process in processes.items():
                    assert process.stdin is not None and process.stdout is not None
                    process.stdin.write("\n")
                    process.stdin.flush()
                    times[name].append(json.loads(process.stdout.readline()))
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    rows: list[dict[str, Any]] = []
    for name, measured in times.items():
        prefill = statistics.median(t[0] for t in measured[1:])
        decode = statistics.median(t[1] - t[0] for t in measured[1:]) / (NEW_TOKENS - 1)
        rows.append({"contender": name, "prefill_tokens_per_s": PROMPT_TOKENS / prefill, "decode_tokens_per_s": 1 / decode})
    base = rows[0]
    print(f"{'contender':34} {'prefill tok/s':>14} {'ratio':>6} {'decode tok/s':>13} {'ratio':>6}")
    for row in rows:
        ratios = [row[key] / base[key] for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
        print(
            f"{row['contender']:34} {row['prefill_tokens_per_s']:14.0f} {ratios[0]:6.2f} "
            f"{row['decode_tokens_per_s']:13.0f} {ratios[1]:6.2f}"
        )
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], Path(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples/ngpt-tiny")
        parser.add_argument("--rounds", type=int, default=5)
        arguments = parser.parse_args()
        run(arguments.checkpoint, arguments.rounds)
