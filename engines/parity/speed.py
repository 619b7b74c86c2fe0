"""How fast an engine is against PyTorch: both in one process with a thread each, in turns, so that a slow spell of the machine
hits both alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.checkpoint import Checkpoint, expected_tensors
from ngpt.errors import BuildError, missing_package
from ngpt.progress import Progress, silent

ROUNDS = 9
PROMPT, STEPS = 192, 48
Times = tuple[float, float]
"""Seconds of reading the prompt, seconds of decoding."""


def speed_ratios(folder: Path, checkpoint: Checkpoint, progress: Progress = silent) -> dict[str, float]:
    """ "prefill" and "decode": how many times as many tokens a second the engine does, one sequence at a time: the median over
    `ROUNDS` of the ratio of two turns that follow each other. PyTorch computes in float32; both have one thread on a CPU.

    Raises BuildError where the PyTorch model does not fit into the memory that is free, and what loading an engine raises.
    """
    from engines.runtime.engine import open_runner
    from engines.runtime.manifest import read_manifest

    _check_memory(checkpoint)
    manifest = read_manifest(folder)
    steps = min(STEPS, manifest.model.max_length // 2)
    prompt = min(PROMPT, manifest.model.max_length - steps)
    tokens = np.random.default_rng(0).integers(0, checkpoint.spec.vocab_size, prompt, dtype=np.int64)
    runner = open_runner(folder, manifest, 1, threads=1)
    try:
        contenders = (_engine(runner, tokens, steps), _torch(checkpoint, tokens, steps))
        times: list[list[Times]] = [[], []]
        for number in range(ROUNDS + 1):  # the first one warms up
            progress("timing the engine and PyTorch", number / (ROUNDS + 1))
            for found, run in zip(times, contenders, strict=True):
                found.append(run())
    finally:
        runner.release()
    ratios = {}
    for place, name in enumerate(("prefill", "decode")):
        engine, torch = ([pair[place] for pair in found[1:]] for found in times)
        ratios[name] = statistics.median(slow / fast for slow, fast in zip(torch, engine, strict=True))
    return ratios


def _engine(runner: Any, tokens: np.ndarray[tuple[int], np.dtype[np.int64]], steps: int) -> Callable[[], Times]:
    def run() -> Times:
        slot = runner.open()
        try:
            start = time.perf_counter()
            logits = runner.prefill(slot, tokens)
            middle = time.perf_counter()
            for _ in range(steps):
                logits = runner.decode([slot], np.asarray([int(np.argmax(logits))], np.int64))[0]
            return middle - start, time.perf_counter() - middle
        finally:
            runner.close(slot)

    return run


def _torch(checkpoint: Checkpoint, tokens: np.ndarray[tuple[int], np.dtype[np.int64]], steps: int) -> Callable[[], Times]:
    try:
        import torch
        from transformers import DynamicCache

        from ngpt import NGPTConfig, NGPTForCausalLM
    except ImportError as error:
        raise missing_package("timing against PyTorch needs torch and transformers", "torch", found=str(error)) from error
    model = NGPTForCausalLM(NGPTConfig(**checkpoint.config)).float().eval()
    state = {name: checkpoint.get(name).float() for name in checkpoint.names()}
    model.load_state_dict(state, strict=False)  # a tied head is the table
    ids = torch.from_numpy(tokens)[None]

    @torch.no_grad()
    def run() -> Times:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return timed()
        finally:
            torch.set_num_threads(threads)

    def timed() -> Times:
        cache = DynamicCache()
        start = time.perf_counter()
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        middle = time.perf_counter()
        for _ in range(steps):
            following = logits[:, -1:].argmax(-1)
            logits = model(input_ids=following, past_key_values=cache, use_cache=True).logits
        return middle - start, time.perf_counter() - middle

    return run


def _check_memory(checkpoint: Checkpoint) -> None:
    needed = 4 * sum(math.prod(expected.shape) for expected in expected_tensors(checkpoint.spec).values())
    needed *= 2  # as it is loaded
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        free = 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return
    if needed > free:
        raise BuildError(
            "timing against PyTorch loads the whole model in float32",
            expected=f"{needed / 1e9:.1f} GB of free memory",
            found=f"{free / 1e9:.1f} GB",
            remedy="leave --speed out, or use a machine with more memory",
        )
