"""A rehearsal of the sections that need a GPU, with the CPU in its place: every line of them runs, no number means anything.

Stand-ins: "cuda" means "cpu" in every call of torch, an emulated device runs the kernels, the host's clock times them, and
torch.compile returns what it is given.
"""

import time

import pytest
import torch
from torch.overrides import TorchFunctionMode

from export.plugins.compile import compile_ptx
from export.plugins.kernels import HypersphereUpdate, QKNorm
from scripts.gpu import decoder, kernels, model, timing
from scripts.gpu.report import run_sections
from tests.doubles.emulator import Emulator
from tests.gpu.test_sections import emulated

HIDDEN = 64


class CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return function(*("cpu" if a == "cuda" else a for a in arguments), **options)


class Card:
    L2_cache_size = 1 << 16
    major, minor = 9, 0


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    made = [HypersphereUpdate(HIDDEN, eps, dtype) for eps in (0.0, 1e-6) for dtype in ("float32", "float16", "bfloat16")]
    made += [QKNorm(4, 2, 16, 16, dtype) for dtype in ("float32", "float16", "bfloat16")]
    emulator = Emulator(made, tmp_path)

    def launcher_for(driver, arch):
        assert driver == "a driver" and arch == 90
        run = emulated(emulator)
        return lambda kernel: (compile_ptx(kernel, arch), run(kernel))[1]

    def host_seconds(run, replays=1, warm_up=0):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    for module in (kernels, model):
        monkeypatch.setattr(module, "drivers", lambda: {"double": "a driver"})
        monkeypatch.setattr(module, "launcher_for", launcher_for)
        monkeypatch.setattr(module, "require_cuda", lambda: torch)
    for name, value in {
        "get_device_capability": lambda: (9, 0), "get_device_properties": lambda index: Card, "mem_get_info": lambda: (1 << 40, 1 << 40),
        "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(timing, "seconds", host_seconds)
    monkeypatch.setattr(timing, "seconds_per_call", lambda calls: host_seconds(lambda: [call() for call in calls]) / len(calls))
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e9)
    with CudaIsCpu():
        yield


def test_kernels(rehearsal, monkeypatch):
    for name, value in {"SIZE": HIDDEN, "HEADS": 4, "KEYS": 2, "CHANNELS": 16, "LENGTH": 64}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(kernels, "TOKENS", dict.fromkeys(kernels.TOKENS, (1, 8)))
    rows = run_sections({"kernels": kernels.section}, lambda text: None)
    assert len(rows) == 3 * 2 + 1 + 3 * 2 * 2
    assert [row.verdict for row in rows[:6]] == ["ok"] * 6 and rows[6].what == "device copy"
    assert all(row.verdict in ("ok", "below goal") and row.value > 0 and "compiled" in row.note for row in rows[7:])


def test_model(rehearsal, monkeypatch):
    monkeypatch.setattr(
        model,
        "Shape",
        lambda layers: decoder.Shape(vocab=32, hidden=HIDDEN, inner=96, layers=layers, heads=4, keys=2, channels=16),
    )
    rows = run_sections({"model": lambda: model.section(layers=2, context=12)}, lambda text: None)
    assert [row.verdict for row in rows] == ["measured"] * len(rows) and len(rows) == 1 + 2 * 3 * 3
    assert {row.what for row in rows if "batch 16" in row.what and "our" in row.what} == {
        f"eager with our kernels, batch 16: {what}" for what in ("prefill", "decode", "decode as a graph")
    }


def test_model_that_does_not_fit(rehearsal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 << 30, 16 << 30))
    (row,) = run_sections({"model": lambda: model.section(layers=32, context=2048)}, lambda text: None)
    assert row.verdict == "skipped" and "lower --layers" in row.note
