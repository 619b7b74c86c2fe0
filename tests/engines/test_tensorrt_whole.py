"""From build to tokens: engine folders as `build_engine` writes them, run by TensorRTRunner on a double of the device.

The double (tests/doubles/cuda_double.py) executes the network that TensorRT-RTX holds, computed by tests/doubles/tensorrt_evaluator.py
on the memory that the runner bound. What it cannot show is that the plan, which only a GPU can open, is that network.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from engines import load_engine
from engines.build import build_engine
from engines.parity import verify
from engines.runtime.manifest import read_manifest, write_manifest
from export.lowerings.tensorrt.library import load_library
from export.precision import TENSORRT
from ngpt.checkpoint import open_checkpoint
from tests.conftest import GOLDEN, Golden
from tests.doubles.cuda_double import CudaDouble, decoder
from tests.engines.tensorrt_making import install
from tests.export.tensorrt_network import OLD_FEATURES, Network


@pytest.fixture
def built(tmp_path, monkeypatch):
    """built(case, precision, composed=False) -> engine folder, whose runtime is from then on the double."""
    networks = []

    def make(case, precision, composed=False):
        library = load_library("tensorrt_rtx")
        if composed:
            for feature in OLD_FEATURES:
                monkeypatch.setattr(library, feature, False)
            monkeypatch.setattr("engines.backends.tensorrt.load_library", lambda name: library)
        folder = build_engine(GOLDEN / case, "rtx-5090", tmp_path / "engine", precision=precision)
        manifest = read_manifest(folder)
        net = Network(GOLDEN / case, library, precision)
        networks.append(net)
        cuda = CudaDouble(memory=1 << 33)
        sizes = {key: manifest.flags[key] for key in ("prefill_tokens", "decode_batch")}
        plan = (folder / manifest.graph).read_bytes()
        install(monkeypatch, cuda, decoder(cuda, net.evaluate, manifest.model, manifest.target.cache, plan=plan, **sizes))
        return folder

    yield make
    for net in networks:
        net.close()


@pytest.mark.parametrize("composed", [False, True], ids=["native", "composed"])
@pytest.mark.parametrize("case", ["gqa", "llama3-rope-bias", "research-checkpoint"])
def test_golden_tokens_from_a_built_engine(built, case, composed):
    folder = built(case, "fp32", composed)
    assert read_manifest(folder).target.cache == ("past-present" if composed else "in-place")
    golden = Golden(case)
    length = golden.ids.shape[1]
    with load_engine(folder, num_slots=2) as engine:
        out = engine.generate(list(golden.ids), max_new_tokens=golden.greedy.shape[1] - length, ignore_eos=True)
        logits = engine.logits(golden.ids)
    np.testing.assert_array_equal(np.array(out), golden.greedy[:, length:])
    assert np.abs(logits - golden.logits).max() <= 2e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8", "int4"])
def test_verify_passes_a_right_engine_in_every_precision(built, precision, tmp_path):
    folder = built("gqa", precision)
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        summary = verify(folder, checkpoint, decode_steps=16).summary
    assert summary["verdict"] == "pass", summary["failed_checks"]
    assert ("quantization" in summary) == (precision in ("int8", "fp8", "int4"))


def test_verify_fails_an_engine_of_another_precision(built, tmp_path, monkeypatch):
    """int4 weights behind a manifest that says fp16: the check sees what the engine computes, not what it says."""
    folder = built("gqa", "int4")
    manifest = read_manifest(folder)
    target = dataclasses.replace(manifest.target, precision="fp16")
    write_manifest(folder, dataclasses.replace(manifest, target=target, precision=TENSORRT["fp16"].describe()))
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        summary = verify(folder, checkpoint, decode_steps=8).summary
    assert summary["verdict"] == "fail" and summary["failed_checks"]


def test_an_engine_for_one_sequence_is_verified_and_loaded_with_one_slot(built, tmp_path, monkeypatch):
    """On a card whose memory holds one sequence: nobody has to know to ask for fewer slots than usual."""
    monkeypatch.setattr("engines.backends.tensorrt.check_fits", lambda spec, target: SimpleNamespace(sequences=lambda context: 1))
    folder = built("gqa", "fp32")
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        summary = verify(folder, checkpoint, decode_steps=4).summary
    assert summary["verdict"] == "pass"
    with load_engine(folder) as engine:
        assert engine.runner.num_slots == read_manifest(folder).flags["decode_batch"] == 1


def test_an_engine_that_cannot_be_run_here_is_kept_and_says_so(tmp_path, monkeypatch):
    """The real libraries on a machine without a driver that is taken for one with the right card."""
    monkeypatch.setattr("engines.build.runs_here", lambda target: True)
    folder = build_engine(GOLDEN / "gqa", "rtx-5090", tmp_path / "engine")
    manifest = read_manifest(folder)
    assert manifest.parity is None and manifest.target.note.startswith("could not be run here: ")
    assert (folder / "model.engine").stat().st_size > 100_000
