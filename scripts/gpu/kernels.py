"""Section `kernels`: our two kernels against float64, the copy bandwidth, eager PyTorch and torch.compile, at the 8B shape.

Not executed on a CUDA device; `accuracy` is tested on the CPU with the emulated device in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.plugins import reference
from export.plugins.compile import ARCHITECTURES, compile_ptx
from export.plugins.kernels import HypersphereUpdate, Kernel, QKNorm
from scripts.gpu import timing
from scripts.gpu.driver import Driver, Launcher, drivers
from scripts.gpu.machine import architecture, require_cuda
from scripts.gpu.norms import NAMES, KernelNorms, Norms, TorchNorms
from scripts.gpu.report import Row, Unavailable

SECTION = "kernels"
SIZE, HEADS, KEYS, CHANNELS, LENGTH, EPS = 4096, 32, 8, 128, 8192, 1e-6
TOKENS = {torch.bfloat16: (1, 4, 16, 64, 256, 1024, 4096), torch.float16: (1, 256, 4096), torch.float32: (1, 256, 4096)}
# Rows of these magnitudes: squares of the outer ones leave float32's range.
MAGNITUDES = {"float32": (1, 1e30, 1e-30, 0), "float16": (1, 6e4, 1e-7, 0), "bfloat16": (1, 1e30, 1e-30, 0)}
COPY_FRACTION = 0.9  # goal where the data exceeds L2
NOISE = 1.02  # times closer than this are a draw


def section() -> Iterable[Row]:
    """Errors first, then times. Raises Unavailable without a device, a driver library or a card new enough."""
    require_cuda()
    found = drivers()
    if not found:
        raise Unavailable("neither cuda-bindings nor libcuda.so.1 can be loaded")
    arch = architecture(torch.cuda.get_device_capability(), list(ARCHITECTURES))
    torch.zeros(1, device="cuda")  # makes the context that the driver calls below use
    launches = {name: launcher_for(driver, arch) for name, driver in found.items()}
    for name, launch in launches.items():
        for dtype in TOKENS:
            yield from accuracy(KernelNorms(launch), dtype, "cuda", f"PTX sm_{arch} through {name}")
    copy = timing.copy_bandwidth()
    yield Row(SECTION, "device copy", copy / 1e9, "GB/s")
    ours = KernelNorms(next(iter(launches.values())))
    for dtype, counts in TOKENS.items():
        for tokens in counts:
            for work in (_update_work, _norm_work):
                yield _timed(work, ours, dtype, tokens, copy)


def launcher_for(driver: Driver, arch: int) -> Callable[[Kernel], Callable[..., None]]:
    """What KernelNorms asks for: a compiled kernel, loaded through `driver`."""
    return lambda kernel: Launcher(driver, kernel, compile_ptx(kernel, arch))


def accuracy(norms: Norms, dtype: torch.dtype, device: str, note: str, tokens: int = 37) -> Iterator[Row]:
    """Largest error over what float32 arithmetic and one rounding to `dtype` may cause; above 1 has failed."""
    name = NAMES[dtype]
    random = np.random.default_rng(0)

    def stored(array: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(array).to(dtype).to(device)

    def wide(tensor: Tensor) -> NDArray[np.float64]:
        return tensor.double().cpu().numpy()

    rows = random.permutation(tokens)
    scales = np.resize(MAGNITUDES[name], tokens)[:, None]
    h, x = (stored(random.uniform(-1, 1, (tokens, SIZE)) * scale) for scale in (scales, scales[rows]))
    lr = torch.from_numpy(random.uniform(0.01, 0.5, SIZE).astype(np.float32)).to(device)
    got = wide(norms.update(h, x, lr, EPS))
    want, allowed = reference.hypersphere_update(HypersphereUpdate(SIZE, EPS, name), wide(h), wide(x), wide(lr))
    yield _judged(f"hypersphere_update {name}", [(got, want, allowed)], note)

    kernel = QKNorm(HEADS, KEYS, CHANNELS, CHANNELS, name)
    heads = random.uniform(-1, 1, (1, tokens, HEADS + KEYS, CHANNELS)) * np.resize(MAGNITUDES[name], (1, tokens, HEADS + KEYS, 1))
    qk = stored(heads.reshape(1, tokens, -1))
    cos, sin = (table.to(device) for table in _tables())
    positions = torch.from_numpy(random.integers(0, LENGTH, (1, tokens)).astype(np.int32)).to(device)
    q_scale = torch.from_numpy(random.uniform(0.5, 12, HEADS * CHANNELS).astype(np.float32)).to(device)
    both = norms.qk(qk, cos, sin, positions, q_scale, HEADS)
    where = positions.cpu().numpy().astype(np.int64)
    expected, limits = reference.qk_norm(kernel, wide(qk), wide(cos), wide(sin), where, wide(q_scale))
    yield _judged(f"qk_norm {name}", [(wide(g), w, a) for g, w, a in zip(both, expected, limits, strict=True)], note)


def _judged(what: str, results: list[tuple[NDArray[np.float64], ...]], note: str) -> Row:
    ratio = largest = 0.0
    for got, want, allowed in results:
        error = np.nan_to_num(np.abs(got - want), nan=np.inf)
        largest = max(largest, float(error.max()))
        ratio = max(ratio, float(np.where(error == 0, 0, error / np.maximum(allowed, 1e-300)).max()))
    return Row(
        SECTION, f"{what}: error / allowed", ratio, "", "ok" if ratio <= 1 else "FAILED", f"largest error {largest:.2e}; {note}"
    )


def _tables() -> tuple[Tensor, Tensor]:
    angles = torch.arange(LENGTH)[:, None] * 1e6 ** (-torch.arange(0, CHANNELS, 2) / CHANNELS)
    return angles.cos(), angles.sin()


Work = tuple[str, int, Callable[[Norms], Callable[[], object]]]


def _update_work(dtype: torch.dtype, tokens: int) -> Work:
    """Name, bytes moved by one call, and what makes a call on fresh buffers."""
    lr = torch.rand(SIZE, device="cuda") * 0.1

    def make(norms: Norms) -> Callable[[], object]:
        h, x = (torch.randn(tokens, SIZE, device="cuda", dtype=dtype) for _ in range(2))
        return lambda: norms.update(h, x, lr, EPS)

    return "hypersphere_update", 3 * tokens * SIZE * dtype.itemsize + 4 * SIZE, make


def _norm_work(dtype: torch.dtype, tokens: int) -> Work:
    cos, sin = (table.to("cuda") for table in _tables())
    q_scale = torch.rand(HEADS * CHANNELS, device="cuda") + 0.5
    positions = torch.arange(tokens, device="cuda", dtype=torch.int32)[None]

    def make(norms: Norms) -> Callable[[], object]:
        qk = torch.randn(1, tokens, (HEADS + KEYS) * CHANNELS, device="cuda", dtype=dtype)
        return lambda: norms.qk(qk, cos, sin, positions, q_scale, HEADS)

    moved = 2 * tokens * (HEADS + KEYS) * CHANNELS * dtype.itemsize + 4 * (tokens * (CHANNELS + 1) + HEADS * CHANNELS)
    return "qk_norm", moved, make


class _Compiled(TorchNorms):
    """TorchNorms under torch.compile, for one shape: more shapes would meet dynamo's limit and fall back to eager in silence."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.update = torch.compile(super().update, dynamic=False, fullgraph=True)  # type: ignore[method-assign]
        self.qk = torch.compile(super().qk, dynamic=False, fullgraph=True)  # type: ignore[method-assign]


def _timed(work: Callable[[torch.dtype, int], Work], ours: Norms, dtype: torch.dtype, tokens: int, copy: float) -> Row:
    name, moved, make = work(dtype, tokens)
    sets, beyond_l2 = timing.sets_of_buffers(moved, torch.cuda.get_device_properties(0).L2_cache_size)
    times = {}
    for contender, norms in (("ours", ours), ("eager", TorchNorms()), ("compiled", _Compiled())):
        times[contender] = timing.seconds_per_call([make(norms) for _ in range(sets)])
    fraction = moved / times["ours"] / copy
    reached = times["ours"] <= NOISE * times["compiled"] and (fraction >= COPY_FRACTION or not beyond_l2)
    against = ", ".join(f"{other} {times[other] / times['ours']:.2f}x" for other in ("eager", "compiled"))
    place = "beyond L2" if beyond_l2 else "partly in L2"
    return Row(
        SECTION,
        f"{name} {NAMES[dtype]} {tokens} tokens",
        fraction,
        "of copy",
        "ok" if reached else "below goal",
        f"{times['ours'] * 1e6:.2f} us; {against}; {sets} sets, {place}",
    )
