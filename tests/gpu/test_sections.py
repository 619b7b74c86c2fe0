"""What the sections compute, on the CPU: the emulated device runs the kernels where a GPU would."""

import ctypes
import math
import struct

import ml_dtypes
import numpy as np
import pytest
import torch

from export.plugins.kernels import HypersphereUpdate, QKNorm
from export.weights import DeployedWeights, rope_tables
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights
from scripts.gpu import decoder, golden, kernels, timing
from scripts.gpu.driver import Launcher, pack
from scripts.gpu.norms import NAMES, KernelNorms, TorchNorms
from tests.conftest import GOLDEN, Golden
from tests.doubles.emulator import Emulator

GOLDEN_BOUND = 2e-5


def array(value):
    """The memory of a CPU tensor as NumPy sees it."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if value.dtype == torch.bfloat16 else value.numpy()


def emulated(emulator):
    """What KernelNorms asks for, on the emulated device."""
    return lambda kernel: lambda count, *arguments: emulator.launch(kernel, count, *map(array, arguments))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    made = [HypersphereUpdate(kernels.SIZE, kernels.EPS, name) for name in NAMES.values()]
    made += [QKNorm(kernels.HEADS, kernels.KEYS, kernels.CHANNELS, kernels.CHANNELS, name) for name in NAMES.values()]
    made += [HypersphereUpdate(64, eps, "float32") for eps in (0.0, decoder.MLP_EPS)] + [QKNorm(4, 2, 16, 16, "float32")]
    return Emulator(made, tmp_path_factory.mktemp("emulator"))


@pytest.mark.parametrize("dtype", NAMES)
def test_accuracy_rows_of_the_kernels(emulator, dtype):
    rows = list(kernels.accuracy(KernelNorms(emulated(emulator)), dtype, "cpu", "emulated", tokens=5))
    assert [row.verdict for row in rows] == ["ok", "ok"] and all(0 < row.value <= 1 for row in rows)


def test_accuracy_sees_a_wrong_result(emulator):
    class Wrong(KernelNorms):
        def update(self, h, x, lr, eps):
            return super().update(h, x, lr * 1.01, eps)

        def qk(self, *arguments):
            q, k = super().qk(*arguments)
            return k.repeat_interleave(4, 1), k

    rows = list(kernels.accuracy(Wrong(emulated(emulator)), torch.float32, "cpu", "", tokens=5))
    assert [row.verdict for row in rows] == ["FAILED", "FAILED"]


def test_torch_norms_agree_with_the_kernels(emulator):
    """The contenders of the timings compute the same thing (on plain rows: PyTorch's own squares overflow)."""
    torch.manual_seed(0)
    ours, plain = KernelNorms(emulated(emulator)), TorchNorms()
    h, x = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    lr = torch.rand(64)
    assert (ours.update(h, x, lr, 1e-6) - plain.update(h, x, lr, 1e-6)).abs().max() < 1e-6
    angles = torch.rand(9, 8)
    arguments = (
        torch.randn(2, 3, 6 * 16),
        angles.cos(),
        angles.sin(),
        torch.randint(9, (2, 3), dtype=torch.int32),
        torch.rand(64),
        4,
    )
    for a, b in zip(ours.qk(*arguments), plain.qk(*arguments), strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-6


def golden_decoder(norms, length):
    case = Golden("gqa")
    with open_checkpoint(case.folder) as checkpoint:
        deployed = DeployedWeights(Weights(checkpoint))
        spec = deployed.spec

        def get(name):
            return torch.from_numpy(np.array(deployed.get(name)))

        def layer(i):
            attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
            matrices = (get(f"{attn}.v.weight"), get(f"{attn}.o.weight"), get(f"{mlp}.up.weight"), get(f"{mlp}.down.weight"))
            qk = torch.cat((get(f"{attn}.q.weight"), get(f"{attn}.k.weight")))
            return decoder.Layer(qk, *matrices, get(f"{attn}.lr"), get(f"{mlp}.lr"), get(f"{attn}.q_scale"))

        cos, sin = (torch.from_numpy(np.array(table)) for table in rope_tables(spec))
        layers = [layer(i) for i in range(spec.num_layers)]
        weights = decoder.Weights(get("embed"), get("head.weight"), layers, cos, sin)
        shape = decoder.Shape(
            spec.vocab_size, spec.hidden_size, weights.layers[0].up.shape[0], spec.num_layers, spec.num_heads, spec.num_kv_heads,
            spec.head_dim,
        )  # fmt: skip
    return decoder.Decoder(shape, weights, norms, len(case.ids), length), case


@pytest.mark.parametrize("kind", ["torch", "kernels"])
def test_the_decoder_that_is_timed_gives_golden_logits(kind, emulator):
    norms = TorchNorms() if kind == "torch" else KernelNorms(emulated(emulator))
    timed, case = golden_decoder(norms, Golden("gqa").ids.shape[1])
    ids = torch.from_numpy(case.ids)
    with torch.no_grad():
        everywhere = timed.prefill(ids, all_logits=True)
        timed.prefill(ids[:, :-1])
        last = timed.decode(ids[:, -1:])
    assert np.abs(everywhere.double().numpy() - case.logits).max() <= GOLDEN_BOUND
    assert np.abs(last.double().numpy() - case.logits[:, -1]).max() <= GOLDEN_BOUND


def test_random_weights_have_the_shapes_of_the_timed_decoder():
    shape = decoder.Shape(vocab=32, hidden=64, inner=96, layers=2, heads=4, keys=2, channels=16)
    weights = decoder.random_weights(shape, 8, torch.float32, "cpu")
    timed = decoder.Decoder(shape, weights, TorchNorms(), 3, 8)
    logits = timed.decode(torch.zeros(3, 1, dtype=torch.int64))
    assert logits.shape == (3, 32) and torch.isfinite(logits).all()
    per_layer = 4 * (64 * (6 * 16 + 2 * 16 + 64 + 2 * 96) + 64 + 64 + 64)
    assert weights.bytes_read_per_step() == 2 * per_layer + 4 * 32 * 64
    assert timed.bytes_read_per_step() - weights.bytes_read_per_step() == 2 * 2 * 4 * 3 * 2 * 8 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_golden_rows(dtype):
    row = golden.compare(GOLDEN / "gqa", dtype, "cpu")
    assert row.verdict == ("ok" if dtype == torch.float32 else "measured")
    assert 0 < row.value < (GOLDEN_BOUND if dtype == torch.float32 else 1)


def test_arguments_are_packed_in_the_order_and_width_of_the_parameters():
    kernel = HypersphereUpdate(64, 0.0, "float16")
    addresses, values = pack(kernel, [0x1122334455667788, 2, 3, 7, 5])
    assert [ctypes.sizeof(value) for value in values] == [8, 8, 8, 4, 8]
    assert ctypes.string_at(addresses[0], 8) == struct.pack("<Q", 0x1122334455667788)
    assert ctypes.string_at(addresses[3], 4) == struct.pack("<i", 7)
    with pytest.raises(ValueError):
        pack(kernel, [1, 2, 3])


def test_launcher_asks_the_driver_for_what_the_kernel_says(monkeypatch):
    calls = []

    class Recorder:
        def function(self, ptx, name):
            calls.append((ptx, name))
            return "handle"

        def launch(self, function, grid, block, stream, addresses):
            pointers = [ctypes.cast(addresses[i], ctypes.POINTER(ctypes.c_uint64))[0] for i in (0, 1, 2, 4)]
            rows = ctypes.cast(addresses[3], ctypes.POINTER(ctypes.c_int32))[0]
            calls.append((function, grid, block, stream, pointers, rows))

    class Stream:
        cuda_stream = 99

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    kernel = HypersphereUpdate(64, 0.0, "float16")
    launcher = Launcher(Recorder(), kernel, "ptx")
    tensors = [torch.zeros(21, 64, dtype=torch.float16) for _ in range(3)]
    lr = torch.zeros(64)
    launcher(21, tensors[0], tensors[1], lr, 21, tensors[2])
    assert calls[0] == (b"ptx\0", b"hypersphere_update\0")
    assert calls[1] == (
        "handle", math.ceil(21 / kernel.block[1]), kernel.block, 99, [t.data_ptr() for t in (tensors[0], tensors[1], lr, tensors[2])], 21,
    )  # fmt: skip


def test_buffers_are_rotated_beyond_the_cache_where_memory_allows():
    megabyte = 1 << 20
    sets, beyond = timing.sets_of_buffers(10 * megabyte, 50 * megabyte)
    assert sets == 20 and beyond
    assert timing.sets_of_buffers(1 << 30, 50 * megabyte) == (4, True)
    assert timing.sets_of_buffers(24576, 50 * megabyte) == (timing.MOST_SETS, False)
