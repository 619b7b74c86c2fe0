"""Section `rtx`: whether a TensorRT-RTX engine built here loads, says what PyTorch says, and how fast it is.

Runs through the product's own builder and runner. Not executed on a CUDA device; rehearsed on the CPU with doubles (tests/gpu).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from scripts.gpu.report import Row, Unavailable

SECTION = "rtx"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
FLOAT32_BOUND = 2e-5  # the golden data's own bound on logits in float32; other precisions are judged by `ngpt-deploy verify`
LAYERS = 4  # of the 8B shape: enough to be bound by memory, small enough to write to a scratch disk


def section(golden: Path, layers: int, context: int) -> Iterable[Row]:
    """Rows of parity and speed. Raises Unavailable without the package or a device."""
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise Unavailable("tensorrt_rtx is not importable") from error
    from scripts.gpu.machine import require_cuda

    torch = require_cuda()
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    if not hasattr(tensorrt_rtx.ComputeCapability, "SM" + capability.replace(".", "")):
        yield Row(
            SECTION, f"compute capability {capability}", note="not among those the library names: its default is built instead"
        )
        capability = ""
    for precision in PRECISIONS:
        yield attempt(f"golden gqa {precision}", partial(parity, golden / "gqa", precision, capability))
    with tempfile.TemporaryDirectory() as scratch:
        from scripts.plan_cost import write_checkpoint

        count = min(layers, LAYERS)
        write_checkpoint(Path(scratch) / "checkpoint", count)
        for precision in ("fp16", "int4"):
            yield from speed(Path(scratch) / "checkpoint", precision, capability, count, context)


def attempt(what: str, measure: Callable[[], Row]) -> Row:
    """One precision must not stop the others: the library refuses some on some cards."""
    try:
        return measure()
    except Exception as error:
        return Row(SECTION, what, verdict="FAILED", note=f"{type(error).__name__}: {error}".replace("\n", " ")[:300])


def target(precision: str, capability: str, *, prefill_tokens: int = 512, decode_batch: int = 16) -> Any:
    """A target for this machine's card, whatever its name. Its memory is not checked: the engines here are small."""
    from engines.target import Gpu, Profile, Target
    from export.precision import TENSORRT

    gpu = Gpu(capability, memory_gb=1000, bandwidth_gb_per_s=1000)
    profile = Profile(prefill_tokens=prefill_tokens, decode_batch=decode_batch)
    numbers = TENSORRT[precision]
    return Target("here", "", "tensorrt_rtx", "native", numbers, "in-place", True, "", gpu=gpu, profile=profile)


def parity(folder: Path, precision: str, capability: str) -> Row:
    """Logits and greedy tokens of a golden case through the whole serving path."""
    from engines import load_engine
    from engines.build import build_engine

    with np.load(folder / "golden.npz") as data:
        ids, logits, greedy = (data[name] for name in ("input_ids", "logits", "greedy"))
    with tempfile.TemporaryDirectory() as scratch:
        engine_folder = build_engine(folder, target(precision, capability), Path(scratch) / "engine", verify=False)
        with load_engine(engine_folder, num_slots=2) as engine:
            error = np.abs(engine.logits(ids) - logits)
            tokens = engine.generate(list(ids), max_new_tokens=greedy.shape[1] - ids.shape[1], ignore_eos=True)
    same = float((np.array(tokens) == greedy[:, ids.shape[1] :]).mean())
    worst = float(np.nan_to_num(error, nan=np.inf).max())
    good = np.isfinite(error).all() and (precision != "fp32" or (worst <= FLOAT32_BOUND and same == 1.0))
    return Row(
        SECTION,
        f"golden gqa {precision}: largest logit error",
        worst,
        "",
        ("ok" if precision == "fp32" else "measured") if good else "FAILED",
        f"mean {error.mean():.2e}, greedy tokens equal {same:.1%}",
    )


def speed(checkpoint: Path, precision: str, capability: str, layers: int, context: int, steps: int = 20) -> Iterable[Row]:
    """Prefill and decode through the runner, host time and copies included, for the 8B shape with few layers."""
    from engines.build import build_engine
    from engines.runtime.engine import open_runner
    from engines.runtime.manifest import read_manifest

    name = f"{layers} layers {precision}"
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        folder = build_engine(checkpoint, target(precision, capability), Path(scratch) / "engine", verify=False)
        yield Row(SECTION, f"{name}: build", time.perf_counter() - start, "s")
        manifest = read_manifest(folder)
        slots = min(16, manifest.flags["decode_batch"])
        runner = open_runner(folder, manifest, slots)
        try:
            context = min(context, manifest.model.max_length - steps - 1)
            prompt = np.arange(context, dtype=np.int64) % manifest.model.vocab_size
            handles = [runner.open() for _ in range(slots)]
            runner.prefill(handles[0], prompt[:8])  # the first run loads kernels
            times = []
            for handle in handles[1:]:
                start = time.perf_counter()
                runner.prefill(handle, prompt)
                times.append(time.perf_counter() - start)
            yield Row(SECTION, f"{name}: prefill of {context} tokens", context / median(times), "tokens/s")
            for batch in sorted({1, slots}):
                chosen, times = handles[1 : batch + 1] if batch < slots else handles, []
                for step in range(steps // 2):
                    start = time.perf_counter()
                    runner.decode(chosen, np.full(len(chosen), step % manifest.model.vocab_size, np.int64))
                    times.append(time.perf_counter() - start)
                note = f"{1e3 * median(times):.2f} ms a step"
                yield Row(SECTION, f"{name}: decode, batch {batch}", len(chosen) / median(times), "tokens/s", note=note)
        finally:
            runner.release()
