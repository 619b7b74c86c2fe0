"""What a manifest says: read typed, each file hashed once, and engines of version 0.1 taken as they were meant."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import engines.record
from engines import build_engine, load_engine
from engines.parity import verify
from engines.record import recorded_precision
from engines.runtime.errors import EngineFileError
from engines.runtime.manifest import Manifest, describe_file, read_manifest, verify_files, write_manifest
from engines.target import load_target
from export.precision import ONNX_RUNTIME, ROW, TENSORRT, Format
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import UnsupportedError
from scripts.cli import main
from tests.conftest import GOLDEN, ROOT, Golden

DATA = ROOT / "tests" / "data"
OLD = DATA / "engine-0.1"
"""Built by version 0.1 (commit f1cea1f): golden gqa for cpu-int8, verified there."""


def old_manifest(name):
    return Manifest.from_dict(json.loads((DATA / "manifests-0.1" / f"{name}.json").read_text()))


def test_an_engine_says_what_its_numbers_are_and_nothing_that_means_nothing(tmp_path):
    folder = build_engine(GOLDEN / "gqa", "cpu-int4", tmp_path / "onnx", verify=False)
    manifest = read_manifest(folder)
    assert manifest.schema_version == 2 and recorded_precision(manifest) == ONNX_RUNTIME["int4"]
    assert manifest.precision["projections"] == "int4/32/float32" and dict(manifest.flags) == {"form": "ort"}
    plan = read_manifest(build_engine(GOLDEN / "gqa", "rtx-5090", tmp_path / "plan", precision="int8", verify=False))
    assert recorded_precision(plan) == TENSORRT["int8"] and plan.target.providers == ()
    assert set(plan.flags) == {"form", "prefill_tokens", "decode_batch", "compute_capability"}


def test_every_file_is_hashed_once(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(engines.record, "describe_file", lambda path: hashed.append(path.name) or describe_file(path))
    folder = build_engine(GOLDEN / "gqa", "cpu-fp32", tmp_path / "engine")
    manifest = read_manifest(folder)
    assert manifest.parity is not None and sorted(hashed) == sorted(name for name in manifest.files)
    verify_files(folder, manifest)


def test_an_engine_of_version_0_1_loads_and_answers():
    manifest = read_manifest(OLD)
    assert manifest.schema_version == 1 and not manifest.precision
    case = Golden("gqa")
    with load_engine(OLD) as engine:
        logits = engine.logits(case.ids, case.mask)
    assert np.abs(logits - case.logits)[case.real].max() < 0.1  # int8 weights; the verdict below is the test of its numbers


def test_an_engine_of_version_0_1_is_inspected_verified_and_packaged(tmp_path, capsys):
    assert main(["inspect", str(OLD)]) == 0
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        summary = verify(OLD, checkpoint, decode_steps=8).summary
    assert summary["verdict"] == "pass" and summary["quantization"] == "int8, blocks of 32"
    assert main(["package", str(OLD), "--output", str(tmp_path / "models")]) == 2
    assert "which files it was reached on" in capsys.readouterr().err
    shutil.copytree(OLD, tmp_path / "engine")
    assert main(["verify", str(tmp_path / "engine"), "--checkpoint", str(GOLDEN / "gqa"), "--decode-steps", "8"]) == 0
    assert main(["package", str(tmp_path / "engine"), "--output", str(tmp_path / "models")]) == 0


@pytest.mark.parametrize(
    ("name", "precision"),
    [("cpu-fp32", ONNX_RUNTIME["fp32"]), ("onnx-portable", ONNX_RUNTIME["fp32"]), ("rtx-5090", TENSORRT["fp16"])],
)
def test_manifests_of_version_0_1_are_understood(name, precision):
    manifest = old_manifest(name)
    assert recorded_precision(manifest) == precision and Manifest.from_dict(manifest.to_dict()) == manifest


def test_the_block_of_version_0_1_is_taken_from_where_it_wrote_it():
    manifest = read_manifest(OLD)
    other = dataclasses.replace(manifest, flags={"form": "ort", "block_size": 64})
    assert recorded_precision(other).projections == Format("int8", 64) == recorded_precision(other).head
    plan = dataclasses.replace(
        old_manifest("rtx-5090"), target=dataclasses.replace(old_manifest("rtx-5090").target, precision="int8")
    )
    assert plan.flags["block_size"] == 32 and recorded_precision(plan).projections.block == ROW  # where it meant nothing


def test_a_schema_from_the_future_is_refused_with_the_command_that_rebuilds(tmp_path):
    shutil.copytree(OLD, tmp_path / "engine")
    data = json.loads((OLD / "manifest.json").read_text())
    (tmp_path / "engine" / "manifest.json").write_text(json.dumps(data | {"schema_version": 3}))
    with pytest.raises(EngineFileError, match="schema_version: expected 1 or 2, found 3.*ngpt-deploy build"):
        load_engine(tmp_path / "engine")


@pytest.mark.parametrize(
    "change", [{"projections": "int8/31/float32"}, {"projections": "gzip"}, {"arithmetic": "float64"}, {"surprise": "1"}]
)
def test_a_precision_that_means_nothing_is_refused_by_the_engines_name(change, tmp_path):
    manifest = read_manifest(OLD)
    bad = dataclasses.replace(manifest, precision=ONNX_RUNTIME["int8"].describe() | change, schema_version=2)
    with pytest.raises(EngineFileError, match="the precision of gqa.*Build the engine again"):
        recorded_precision(bad)
    shutil.copytree(OLD, tmp_path / "engine")
    write_manifest(tmp_path / "engine", bad)
    assert main(["verify", str(tmp_path / "engine"), "--checkpoint", str(GOLDEN / "gqa")]) == 2


def test_the_code_digest_covers_kernels_builders_and_the_network(tmp_path, monkeypatch):
    files = ["export/plugins/kernel.cu", "export/network.py", "ngpt/spec.py", "engines/build.py", "engines/backends/onnx.py"]
    monkeypatch.setattr(engines.record, "__file__", str(tmp_path / "engines" / "record.py"))
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    seen = {engines.record.code_digest()}
    for name in files:
        (tmp_path / name).write_text("two")
        seen.add(engines.record.code_digest())
    assert len(seen) == len(files) + 1


@pytest.mark.parametrize(("code", "block"), [("int8", 64), ("int4", 16), ("int8", 48)])
def test_a_further_format_of_weights_is_one_entry(code, block, tmp_path, monkeypatch):
    """Nothing but the entry knows it: not the lowering, the record, the sum of memory, the parity check, nor the commands."""
    form = Format(code, block)
    further = dataclasses.replace(ONNX_RUNTIME["int8"], name="mine", projections=form, activations=Format("int8", 32))
    monkeypatch.setitem(ONNX_RUNTIME, "mine", further)
    target = dataclasses.replace(load_target("cpu-int8"), precision=further)
    if block == 48:  # which the runtime's product cannot take: its spelling says so
        with pytest.raises(
            UnsupportedError, match="block of layers.0.attn.qkv in ONNX Runtime: expected a power of two, found 48"
        ):
            build_engine(GOLDEN / "gqa", target, tmp_path / "engine")
        assert not (tmp_path / "engine").exists()
        return
    manifest = read_manifest(build_engine(GOLDEN / "gqa", target, tmp_path / "engine"))
    assert manifest.parity["verdict"] == "pass" and recorded_precision(manifest) == further
    assert manifest.parity["quantization"] == f"{code}, blocks of {block}"


def test_verify_knows_an_engines_formats_from_its_manifest():
    """Given as a folder, without a word about its precision."""
    report = verify(OLD, GOLDEN / "gqa", decode_steps=2)
    assert report.verdict == "pass" and report.summary["quantization"] == "int8, blocks of 32"
    assert "int8 activations" in report.summary["noise"]
