"""A runtime from outside: one lowering, one backend, one runner, and no file of the project changed."""

import dataclasses

import numpy as np
import pytest

from engines import build_engine, load_engine
from engines.backends import backend_of, register
from engines.build import dry_run
from engines.runtime import engine as runtime_engine
from engines.runtime.manifest import read_manifest, verify_files
from engines.runtimes import RUNTIMES
from engines.target import load_target
from export.trtllm.parallel import Parallel
from ngpt.errors import PackagingError, TargetError
from scripts.cli import main
from tests.conftest import GOLDEN, Golden
from tests.doubles.toy_runtime import ToyBackend, ToyRunner

TARGET = """description = "a toy"
runtime = "toy"
form = "native"
precision = "fp32"
precisions = ["fp32", "int8"]
cache = "growing"
providers = ["NumPy"]
executed = true
note = ""
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """The file of a target of the toy runtime, which is registered while the test runs."""
    monkeypatch.setattr("engines.backends._BACKENDS", dict(backend_of.__globals__["_BACKENDS"]))
    monkeypatch.setitem(RUNTIMES, "toy", ToyBackend.runtime)
    monkeypatch.setitem(runtime_engine._RUNNERS, "toy", ToyRunner)
    register(ToyBackend())
    path = tmp_path / "toy.toml"
    path.write_text(TARGET)
    return path


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["gqa", "dead-mlp", "llama3-rope-bias"])
def test_it_is_built_verified_loaded_and_asked(name, precision, target, tmp_path, capsys):
    case = Golden(name)
    code = main(
        ["build", "--checkpoint", str(case.folder), "--target", str(target), "--precision", precision]
        + ["--output", str(tmp_path / "engine")]
    )
    assert code == 0 and "parity   pass" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "engine")
    assert (manifest.target.runtime, manifest.graph, manifest.parity["verdict"]) == ("toy", "model.npz", "pass")
    assert manifest.parity["taps"] == 1 + 2 * manifest.model.num_layers  # looked at layer by layer
    if precision == "int8":
        assert manifest.precision["projections"] == "int8/64/float32" and manifest.parity["quantization"] == "int8, blocks of 64"
    verify_files(tmp_path / "engine", manifest)
    with load_engine(tmp_path / "engine") as engine:
        ids = case.ids[:1][:, case.real[0]]
        logits = engine.logits(ids)
        tokens = engine.generate([ids[0].tolist()], max_new_tokens=3, ignore_eos=True)[0]
    if precision == "fp32":
        assert np.abs(logits[0] - case.logits[0][case.real[0]]).max() <= 2e-5
        assert tokens[0] == int(case.logits[0][case.real[0]][-1].argmax())
    assert main(["inspect", str(tmp_path / "engine")]) == 0


def test_a_wrong_engine_of_it_fails(target, tmp_path, monkeypatch):
    """The gate knows nothing of the runtime."""
    from tests.doubles.toy_runtime import ToyLowering

    folder = build_engine(GOLDEN / "gqa", target, tmp_path / "engine", verify=False)
    monkeypatch.setattr(ToyLowering, "sub", lambda self, name, x, y: x - 0.97 * y)
    assert main(["verify", str(folder), "--checkpoint", str(GOLDEN / "gqa"), "--decode-steps", "4"]) == 3


def test_what_it_cannot_do_is_refused_by_name(target, tmp_path, capsys):
    chosen = load_target(target)
    assert "write " in dry_run(GOLDEN / "gqa", chosen, tmp_path / "engine", Parallel())
    with pytest.raises(TargetError, match="target toy is one device's"):
        build_engine(GOLDEN / "gqa", chosen, tmp_path / "engine", tp=2)
    with pytest.raises(TargetError, match="a TensorRT-LLM target, found toy"):
        build_engine(GOLDEN / "gqa", chosen, tmp_path / "engine", kv_cache="fp8")
    with pytest.raises(TargetError, match="precision of the target toy: expected fp32, int8, found int4"):
        load_target(target, "int4")
    with pytest.raises(TargetError, match="a name of its own"):
        register(ToyBackend())
    from triton_repo import package_engine

    folder = build_engine(GOLDEN / "gqa", chosen, tmp_path / "engine", verify=False)
    with pytest.raises(PackagingError, match="no repository serves the runtime of gqa.*found toy"):
        package_engine(folder, tmp_path / "models", allow_unverified=True)
    assert not (tmp_path / "models").exists()


def test_a_name_that_nobody_registered_is_refused_with_those_there_are(tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(TARGET)
    with pytest.raises(TargetError, match="toy.toml: runtime: expected one of onnxruntime, tensorrt, tensorrt_rtx, tensorrt_llm"):
        load_target(path)
    with pytest.raises(TargetError, match="runtime"):
        backend_of("toy")
    with pytest.raises(TargetError):
        dataclasses.replace(load_target("cpu-fp32"), runtime="toy")
