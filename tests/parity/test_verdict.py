"""What a verdict is worth: it looks inside the engine that is served, belongs to its files and its checkpoint, and is recorded."""

import json
import shutil
import sys
import threading

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines import build_engine, load_engine
from engines.parity import ParityReport, verify
from engines.record import record_verdict
from engines.runtime.errors import EngineFileError
from engines.runtime.manifest import describe_file, read_manifest, verify_files
from engines.runtime.verdict import standing
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import BuildError, EngineError, PackagingError
from scripts.cli import main
from tests.ngpt.making import GOLDEN
from triton_repo import package_engine

GQA = GOLDEN / "gqa"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_engine(GQA, "cpu-fp32", tmp_path_factory.mktemp("built") / "engine")


@pytest.fixture
def engine(built, tmp_path):
    return shutil.copytree(built, tmp_path / "engine")


def edit(folder, change, *, honest=True):
    """Change the engine's graph; `honest`: its manifest has the new file's digest and no verdict, as if it had been built so."""
    graph = folder / "model.onnx"
    model = onnx.load(graph)
    change({tensor.name: tensor for tensor in model.graph.initializer}, model.graph)
    onnx.save(model, graph)
    if honest:
        manifest = json.loads((folder / "manifest.json").read_text())
        entry = describe_file(graph)
        manifest["files"]["model.onnx"] = {"bytes": entry.bytes, "sha256": entry.sha256}
        manifest["parity"] = None
        (folder / "manifest.json").write_text(json.dumps(manifest))


def scaled(name, factor):
    def change(weights, _graph):
        array = numpy_helper.to_array(weights[name]) * np.float32(factor)
        weights[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))

    return change


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


# The inside of what is served


@pytest.mark.parametrize(
    ("weight", "tap"),
    [
        ("layers.2.mlp.down.weight", "layers.2.mlp.down"),
        ("layers.1.attn.o.weight", "layers.1.attn.o"),
        ("layers.0.attn.lr.keep", "layers.0.attn.update"),
    ],
)
def test_a_fault_in_the_served_file_is_found_where_it_is(engine, weight, tap):
    edit(engine, scaled(weight, -1))
    report = verify(engine, GQA, decode_steps=4)
    assert report.verdict == "fail" and report.summary["first_divergence"] == tap
    assert report.summary["taps"] == 1 + 9 * 3


def test_a_faithful_engine_has_no_divergence_and_shares_its_weights_meanwhile(built):
    before = sorted(path.name for path in built.parent.iterdir())
    report = verify(built, GQA, decode_steps=4)
    assert report.verdict == "pass" and report.summary["first_divergence"] is None
    assert sorted(path.name for path in built.parent.iterdir()) == before, "nothing is left beside the engine"


# Its files and its checkpoint


def test_one_flipped_bit_is_not_verified(engine):
    raw = bytearray((engine / "model.onnx").read_bytes())
    raw[len(raw) // 2] ^= 1
    (engine / "model.onnx").write_bytes(raw)
    with pytest.raises(EngineFileError, match=r"model\.onnx.*SHA-256"):
        verify(engine, GQA)


def test_another_checkpoint_is_refused(engine, tmp_path):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(GQA, tmp_path / "other")
    file = next(other.glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.1.attn_alpha"] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EngineError, match="not built from this checkpoint: its weights"):
        verify(engine, other)
    theta = json.loads((GQA / "config.json").read_text())
    theta["rope_theta"] = 5e5
    another = shutil.copytree(GQA, tmp_path / "another")
    (another / "config.json").write_text(json.dumps(theta))
    with pytest.raises(EngineError, match="not built from this checkpoint: its spec"):
        verify(engine, another)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parity": {"verdict": "pass"}}, "does not say which files"),
        ({"parity": {"verdict": "pass", "subject": {}}}, "the files of the verdict"),
    ],
)
def test_a_word_in_the_manifest_is_no_verdict(engine, tmp_path, changes, message):
    edit_manifest(engine, **changes)
    with pytest.raises(PackagingError, match=message):
        package_engine(engine, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_verdict_does_not_go_over_to_other_files(engine, tmp_path, capsys):
    parity = json.loads((engine / "manifest.json").read_text())["parity"]
    assert standing(engine, read_manifest(engine)) == "pass"
    edit(engine, scaled("layers.2.mlp.down.weight", -1))
    edit_manifest(engine, parity=parity)
    verify_files(engine, read_manifest(engine))  # the digests are right, the verdict is another's
    with pytest.raises(PackagingError, match=r"reached on another model\.onnx"):
        package_engine(engine, tmp_path / "models", allow_unverified=True)
    with pytest.raises(EngineFileError, match=r"reached on another model\.onnx"):
        load_engine(engine)
    assert main(["inspect", str(engine)]) == 2
    out, err = capsys.readouterr()
    assert "verdict does not hold" in err and "parity   none that holds" in out


@pytest.mark.parametrize("what", ["report", "digest", "checkpoint", "flags", "verdict"])
def test_verdict_report_and_manifest_must_agree(engine, what):
    manifest = json.loads((engine / "manifest.json").read_text())
    report = engine / "parity.json"
    if what == "report":  # a failed report under a manifest that says pass
        data = json.loads(report.read_text()) | {"verdict": "fail"}
        report.write_text(json.dumps(data))
        entry = describe_file(report)
        manifest["files"]["parity.json"] = {"bytes": entry.bytes, "sha256": entry.sha256}
        manifest["parity"]["report_sha256"] = entry.sha256
    elif what == "digest":
        manifest["parity"]["report_sha256"] = "0" * 64
    elif what == "checkpoint":
        manifest["digests"]["weights"] = "sha256:" + "0" * 64
    elif what == "flags":
        manifest["model"]["max_length"] -= 1
    else:
        del manifest["files"]["parity.json"]
    (engine / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineFileError, match="the parity verdict does not hold"):
        load_engine(engine)


def test_tokens_that_end_a_text_are_not_the_verdicts_business(engine):
    manifest = json.loads((engine / "manifest.json").read_text())
    edit_manifest(engine, model=manifest["model"] | {"eos_token_ids": [7]})
    assert standing(engine, read_manifest(engine)) == "pass"


# Recorded


def test_verify_leads_to_package(tmp_path, capsys):
    engine = tmp_path / "engine"
    assert main(["build", "--checkpoint", str(GQA), "--target", "cpu-fp32", "--output", str(engine), "--no-verify"]) == 0
    assert main(["package", str(engine), "--output", str(tmp_path / "models")]) == 2
    assert "verify ENGINE" in capsys.readouterr().err
    verify_args = ["verify", str(engine), "--checkpoint", str(GQA), "--decode-steps", "4"]
    assert main([*verify_args, "--no-record"]) == 0 and (tmp_path / "engine-parity" / "parity.html").is_file()
    assert read_manifest(engine).parity is None
    assert main(verify_args) == 0
    manifest = read_manifest(engine)
    assert manifest.parity["verdict"] == "pass" and manifest.parity["subject"]["files"].keys() >= {"model.onnx", "config.json"}
    verify_files(engine, manifest)
    assert main(["package", str(engine), "--output", str(tmp_path / "models")]) == 0
    assert main(["inspect", str(engine)]) == 0 and "parity   pass" in capsys.readouterr().out


def test_a_failed_check_is_recorded_too_and_a_later_one_takes_its_place(engine, tmp_path):
    good = (engine / "model.onnx").read_bytes()
    edit(engine, scaled("layers.2.mlp.down.weight", -1))
    assert main(["verify", str(engine), "--checkpoint", str(GQA), "--decode-steps", "2"]) == 3
    assert standing(engine, read_manifest(engine)) == "fail"
    with pytest.raises(PackagingError, match="found fail"):
        package_engine(engine, tmp_path / "models")
    assert package_engine(engine, tmp_path / "models", allow_unverified=True).is_dir()
    (engine / "model.onnx").write_bytes(good)
    manifest = json.loads((engine / "manifest.json").read_text())
    entry = describe_file(engine / "model.onnx")
    manifest["files"]["model.onnx"] = {"bytes": entry.bytes, "sha256": entry.sha256}
    edit_manifest(engine, files=manifest["files"])
    assert main(["verify", str(engine), "--checkpoint", str(GQA), "--decode-steps", "2"]) == 0
    assert standing(engine, read_manifest(engine)) == "pass"


def test_a_verdict_comes_from_another_machine_by_its_report(engine, tmp_path, capsys):
    elsewhere = shutil.copytree(engine, tmp_path / "card")
    edit_manifest(engine, parity=None)
    report = elsewhere / "parity.json"
    assert main(["verify", str(engine), "--adopt", str(report)]) == 0
    assert standing(engine, read_manifest(engine)) == "pass" and (engine / "parity.html").read_text().startswith(
        "<!doctype html>"
    )
    edit(engine, scaled("layers.2.mlp.down.weight", 2))
    assert main(["verify", str(engine), "--adopt", str(report)]) == 2
    assert "reached on another model.onnx" in capsys.readouterr().err
    assert main(["verify", str(engine)]) == 2 and main(["verify", str(engine), "--adopt", "x", "--checkpoint", "y"]) == 2


def test_a_report_that_was_edited_is_not_adopted(engine, tmp_path):
    data = json.loads((engine / "parity.json").read_text())
    data["checks"][3]["measured"] = 1e9
    with pytest.raises(EngineFileError, match="over checks that say fail"):
        ParityReport.from_dict(data)
    for key, value in (("checks", {}), ("checks", [1]), ("subject", 3), ("sequences", [{"name": "x"}]), ("summary", None)):
        with pytest.raises(EngineFileError, match="not a parity report of this version"):
            ParityReport.from_dict({**json.loads((engine / "parity.json").read_text()), key: value})
    report = ParityReport.from_dict(json.loads((engine / "parity.json").read_text()))
    assert report.to_dict() == json.loads((engine / "parity.json").read_text())


def test_a_bare_runner_has_nothing_to_record(engine):
    with load_engine(engine, num_slots=3) as loaded, open_checkpoint(GQA) as checkpoint:
        report = verify(loaded, checkpoint, decode_steps=2)
    assert report.verdict == "pass" and report.subject is None
    with pytest.raises(EngineFileError, match="the files of the verdict"):
        record_verdict(engine, report)


def test_killed_between_any_two_writes_the_folder_is_whole(engine, monkeypatch):
    report = verify(engine, GQA, decode_steps=2)
    import engines.parity.report as module

    real, calls = module.replace_file, []

    def stopping(path, text):
        calls.append(path.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(module, "replace_file", stopping)
    for stop in (1, 2):  # noqa: B007  (`stopping` reads it)
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            record_verdict(engine, report)
        manifest = read_manifest(engine)
        assert manifest.parity is None
        verify_files(engine, manifest)
    monkeypatch.setattr(module, "replace_file", real)
    record_verdict(engine, report)
    assert standing(engine, read_manifest(engine)) == "pass"
    verify_files(engine, read_manifest(engine))


def test_two_who_record_at_once_leave_one_of_their_verdicts(engine):
    report = verify(engine, GQA, decode_steps=2)
    threads = [threading.Thread(target=record_verdict, args=(engine, report)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verify_files(engine, read_manifest(engine))
    assert standing(engine, read_manifest(engine)) == "pass"
    assert not list(engine.glob(".*")), "no temporary file is left"


def test_a_build_is_there_before_it_is_verified(tmp_path, monkeypatch, capsys):
    """No trouble of the check throws away what was built."""

    def trouble(*_args, **_options):
        manifest = read_manifest(tmp_path / "engine")
        assert manifest.parity is None
        raise MemoryError

    monkeypatch.setattr(sys.modules["engines.parity.verify"], "run_reference", trouble)
    with pytest.raises(BuildError, match="is built, but could not be verified: found MemoryError.*ngpt-deploy verify"):
        build_engine(GQA, "cpu-fp32", tmp_path / "engine")
    monkeypatch.undo()
    assert main(["verify", str(tmp_path / "engine"), "--checkpoint", str(GQA), "--decode-steps", "2"]) == 0
    assert main(["package", str(tmp_path / "engine"), "--output", str(tmp_path / "models")]) == 0


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8", "cpu-int4", "onnx-portable"])
def test_every_check_decides_on_the_trained_example(target, tmp_path):
    from tests.conftest import TINY

    report = verify(build_engine(TINY, target, tmp_path / "engine", verify=False), TINY)
    assert report.verdict == "pass" and report.summary["not_applicable"] == []
    assert report.summary["stable_positions"] > 0.1
    first = next(check for check in report.checks if check.name.startswith("first choice"))
    assert first.sample > 70 and first.outcome == "pass"


def test_a_check_without_a_sample_is_not_passed():
    from engines.parity.gate import Check, verdict_of

    empty, good = Check("a", 0.0, 0.0, 0.0, "", 0), Check("b", 0.0, 0.0, 0.0, "", 1)
    assert (empty.outcome, empty.passed, empty.failed) == ("not applicable", False, False)
    assert verdict_of([empty]) == "fail" and verdict_of([empty, good]) == "pass"
    assert verdict_of([good, Check("c", float("nan"), 0.0, 0.0, "", 1)]) == "fail"


def one_block(folder, change):
    """Change the codes or scales of one block of one matrix in an engine's file."""
    edit(folder, lambda weights, _graph: change(weights))


def doubled_scale(weights):
    name = "layers.1.mlp.up.scales"
    scales = numpy_helper.to_array(weights[name]).copy()
    scales[np.abs(scales).argmin()] *= 2
    weights[name].CopyFrom(numpy_helper.from_array(scales, name))


def one_code(weights):
    name = "layers.2.attn.qkv.data"
    codes = numpy_helper.to_array(weights[name]).copy()
    codes.reshape(-1)[-1] ^= 0x44
    weights[name].CopyFrom(numpy_helper.from_array(codes, name))


@pytest.mark.parametrize("target", ["cpu-int8", "cpu-int4"])
@pytest.mark.parametrize(
    ("change", "module"),
    [(doubled_scale, "model.layers.1.mlp.up_proj"), (one_code, "model.layers.2.self_attn.v_proj")],
)
def test_one_wrong_block_in_the_file_is_found_by_its_weights(tmp_path, target, change, module):
    """However large the model: the weights of the file that is served are held against the checkpoint's."""
    engine = build_engine(GQA, target, tmp_path / "engine", verify=False)
    good = verify(engine, GQA, decode_steps=2)
    own = [check for check in good.checks if "engine's file" in check.name]
    assert good.verdict == "pass" and len(own) == 3 and all(check.sample == 19 for check in own)
    one_block(engine, change)
    failed = [check.name for check in verify(engine, GQA, decode_steps=2).failures]
    assert f"weights in the engine's file, worst ({module})" in failed


@pytest.mark.parametrize("name", ["llama3-rope-bias", "research-checkpoint", "dead-mlp"])
def test_the_weights_of_a_right_file_are_those_of_the_checkpoint(name, tmp_path):
    report = verify(build_engine(GOLDEN / name, "cpu-int4", tmp_path / "engine", verify=False), GOLDEN / name, decode_steps=2)
    assert report.verdict == "pass", report.failures
    assert any("engine's file" in check.name for check in report.checks) == (name != "research-checkpoint")
