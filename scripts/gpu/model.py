"""Section `model`: prefill and decode speed at the 8B shape with random weights, against the memory-bandwidth floor.

Not executed on a CUDA device; the decoder it times is tested on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from export.plugins.compile import ARCHITECTURES
from scripts.gpu import timing
from scripts.gpu.decoder import Decoder, Shape, random_weights
from scripts.gpu.driver import drivers
from scripts.gpu.kernels import launcher_for
from scripts.gpu.machine import architecture, require_cuda
from scripts.gpu.norms import KernelNorms, Norms, TorchNorms
from scripts.gpu.report import Row, Unavailable

SECTION = "model"
BATCHES = (1, 16)


def section(layers: int, context: int) -> Iterable[Row]:
    """Rows for each contender and batch. Raises Unavailable without a device or where the weights do not fit its memory."""
    require_cuda()
    shape = Shape(layers=layers)
    dtype = torch.bfloat16
    needed = (2 * shape.vocab + layers * (2 * shape.inner + 10240)) * shape.hidden * dtype.itemsize
    free, _ = torch.cuda.mem_get_info()
    if needed * 1.2 > free:
        raise Unavailable(f"{layers} layers need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free: lower --layers")
    weights = random_weights(shape, context, dtype, "cuda")
    copy = timing.copy_bandwidth()
    yield Row(SECTION, "device copy", copy / 1e9, "GB/s", note=f"{layers} layers, context {context}, bfloat16")
    for batch in BATCHES:
        for name, norms, compiled in _contenders():
            decoder = Decoder(shape, weights, norms, batch, context)
            try:
                yield from _speeds(name, decoder, compiled, batch, context, copy)
            except Exception as error:  # one contender that cannot run must not hide the others
                yield Row(SECTION, f"{name}, batch {batch}", verdict="FAILED", note=f"{type(error).__name__}: {error}"[:300])
            torch.cuda.empty_cache()


def _contenders() -> Iterator[tuple[str, Norms, bool]]:
    yield "eager", TorchNorms(), False
    yield "compiled", TorchNorms(), True
    arch = architecture(torch.cuda.get_device_capability(), list(ARCHITECTURES))
    for driver in list(drivers().values())[:1]:
        yield "eager with our kernels", KernelNorms(launcher_for(driver, arch)), False


@torch.no_grad()
def _measured(decoder: Decoder, compiled: bool, batch: int, context: int) -> dict[str, float]:
    """Seconds of a prefill of the whole context and of a decoding step, the latter launched by the host and as a CUDA graph."""
    if compiled:
        torch._dynamo.reset()
        decoder.step = torch.compile(decoder.step, dynamic=False, fullgraph=True)
    prompt = torch.randint(decoder.shape.vocab, (batch, context), device="cuda")
    token = prompt[:, -1:].contiguous()
    times = {"prefill": timing.seconds(lambda: decoder.prefill(prompt), replays=5)}
    times["decode"] = timing.seconds(lambda: decoder.decode(token))
    times["decode as a graph"] = timing.seconds_per_call([lambda: decoder.decode(token)])
    return times


def _speeds(name: str, decoder: Decoder, compiled: bool, batch: int, context: int, copy: float) -> Iterator[Row]:
    times = _measured(decoder, compiled, batch, context)
    floor = decoder.bytes_read_per_step() / copy
    work = 2 * batch * context * sum(t.numel() for layer in decoder.weights.layers for t in vars(layer).values() if t.dim() == 2)
    for what, taken in times.items():
        tokens = batch * (context if what == "prefill" else 1)
        if what == "prefill":
            note = f"{work / taken / 1e12:.0f} TFLOP/s in the layers' matrices; limited by arithmetic, not memory"
        else:
            note = f"floor {batch / floor:.1f} tok/s, reached {floor / taken:.1%} of it; {taken * 1e3:.3f} ms a step"
        yield Row(SECTION, f"{name}, batch {batch}: {what}", tokens / taken, "tok/s", note=note)
