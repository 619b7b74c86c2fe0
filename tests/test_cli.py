"""The installed command: what it prints, what it leaves behind, and how it refuses."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from scripts.cli import main
from tests.conftest import GOLDEN, TINY


def run(capsys, *args):
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "gqa", folder)
    return folder


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def nan(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan


def not_unit(tensors):
    tensors["model.layers.0.self_attn.q_proj.weight"][5] *= 1.02


def integers(tensors):
    tensors["sz.weight"] = tensors["sz.weight"].astype(np.int32)


def misshapen(tensors):
    tensors["model.layers.2.mlp_alpha"] = tensors["model.layers.2.mlp_alpha"][:-1]


BROKEN_TENSORS = {
    "sz.weight": lambda t: t.pop("sz.weight"),
    "surplus": lambda t: t.update(surplus=np.zeros(3, np.float32)),
    "model.layers.2.mlp_alpha": misshapen,
    "model.layers.1.mlp.up_proj.weight": nan,
    "model.layers.0.self_attn.q_proj.weight": not_unit,
    "int": integers,
}


@pytest.mark.parametrize("named", list(BROKEN_TENSORS))
def test_a_broken_checkpoint_is_refused_by_name_and_leaves_nothing(named, checkpoint, tmp_path, capsys):
    edit_tensors(checkpoint, BROKEN_TENSORS[named])
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--output", tmp_path / "engine")
    assert code == 2 and named.lower() in err.lower() and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "ngpt"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"surprise": 1}, "surprise"),
        ({"rope_scaling": {"rope_type": "custom_wavelengths"}}, "custom_wavelengths"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused_by_name(changes, named, checkpoint, tmp_path, capsys):
    edit_config(checkpoint, **changes)
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--output", tmp_path / "engine")
    assert code == 2 and named in err and not (tmp_path / "engine").exists()


def test_truncated_weights_bin_files_and_missing_folders(checkpoint, tmp_path, capsys):
    data = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(data[: len(data) // 2])
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--output", tmp_path / "engine")
    assert code == 2 and "model.safetensors" in err
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--output", tmp_path / "engine")
    assert code == 2 and ".bin" in err and "safetensors" in err
    code, _, err = run(capsys, "build", "--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "engine")
    assert code == 2 and "nowhere" in err


def test_an_unknown_target_names_the_known_ones(checkpoint, tmp_path, capsys):
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--target", "tpu", "--output", tmp_path / "engine")
    assert code == 2 and "'tpu'" in err and "cpu-int8" in err and "onnx-portable" in err


def test_an_output_in_use_is_kept_as_it_is(checkpoint, tmp_path, capsys):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "mine.txt").write_text("keep")
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--output", tmp_path / "engine")
    assert code == 2 and "exists" in err
    assert [p.name for p in (tmp_path / "engine").iterdir()] == ["mine.txt"]


def test_a_full_disk_is_named_and_nothing_stays(checkpoint, tmp_path, capsys, monkeypatch):
    import errno

    import onnx_ir

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", full)
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--output", tmp_path / "engine")
    assert code == 2 and "full" in err and sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_too_little_room_is_said_before_anything_is_written(checkpoint, tmp_path, capsys, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(1, 1, 1000))
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--output", tmp_path / "engine")
    assert code == 2 and "not enough room" in err and "MB" in err


def test_a_missing_package_names_the_extra(checkpoint, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    for name in [name for name in sys.modules if name.startswith("export.lowerings.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = run(capsys, "build", "--checkpoint", checkpoint, "--output", tmp_path / "engine")
    assert code == 2 and "pip install 'onnx>=1.20'" in err


def test_debug_shows_the_traceback(tmp_path):
    from ngpt.errors import NGPTDeployError

    with pytest.raises(NGPTDeployError):
        main(["build", "--debug", "--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "e")])


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8", "cpu-int4", "onnx-portable"])
def test_build_verifies_every_cpu_target(target, checkpoint, tmp_path, capsys):
    engine = tmp_path / "engine"
    code, out, _ = run(capsys, "build", "--checkpoint", checkpoint, "--target", target, "--output", engine)
    manifest = json.loads((engine / "manifest.json").read_text())
    assert code == 0 and "pass" in out
    assert manifest["parity"]["verdict"] == "pass" and manifest["parity"]["decode_steps"] >= 64
    assert {"model.onnx", "genai_config.json", "parity.json", "parity.html"} <= set(manifest["files"])


def test_cuda_target_is_built_and_says_it_was_not_executed(checkpoint, tmp_path, capsys):
    engine = tmp_path / "engine"
    code, out, _ = run(capsys, "build", "--checkpoint", checkpoint, "--target", "cuda-fp16", "--output", engine)
    assert code == 0 and "not executed on a CUDA device" in out
    assert json.loads((engine / "manifest.json").read_text())["parity"] is None
    code, _, err = run(capsys, "generate", "x", "--engine", engine)
    assert code == 2 and "CUDAExecutionProvider" in err and "onnx-gpu" in err


def test_inspect_and_verify_tell_and_a_wrong_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    engine = tmp_path / "engine"
    run(capsys, "build", "--checkpoint", checkpoint, "--target", "cpu-fp32", "--output", engine, "--no-verify")
    code, out, _ = run(capsys, "inspect", engine)
    assert code == 0 and "not verified" in out and "3 layers" in out
    code, out, _ = run(capsys, "verify", engine, "--checkpoint", checkpoint, "--report", tmp_path / "good")
    assert code == 0 and (tmp_path / "good" / "parity.html").is_file()
    code, out, err = run(capsys, "verify", engine, "--checkpoint", GOLDEN / "dead-mlp", "--report", tmp_path / "bad")
    assert code == 2 and "was not built from this checkpoint: its weights" in err
    damaged = engine / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    code, _, err = run(capsys, "generate", "x", "--engine", engine)
    assert code == 2 and "model.onnx" in err


def test_package_refuses_an_unverified_engine(checkpoint, tmp_path, capsys):
    engine = tmp_path / "engine"
    run(capsys, "build", "--checkpoint", checkpoint, "--output", engine, "--no-verify")
    code, _, err = run(capsys, "package", engine, "--output", tmp_path / "models")
    assert code == 2 and "allow-unverified" in err.replace("_", "-") and not (tmp_path / "models").exists()


def test_convert_research_checkpoint_and_carry_the_code(tmp_path, capsys):
    out = tmp_path / "hf"
    code, _, _ = run(
        capsys, "convert", "--checkpoint", GOLDEN / "research-checkpoint" / "ckpt.pt", "--output", out, "--with-code"
    )
    config = json.loads((out / "config.json").read_text())
    assert (
        code == 0
        and config["position_code"] == "research"
        and config["auto_map"]["AutoModelForCausalLM"] == "model.NGPTForCausalLM"
    )
    assert (out / "model.py").is_file()


def test_convert_folds_the_scales_into_the_head(tmp_path, capsys):
    out = tmp_path / "folded"
    code, _, _ = run(capsys, "convert", "--checkpoint", GOLDEN / "gqa", "--output", out, "--fold-scales", "--with-code")
    config = json.loads((out / "config.json").read_text())
    assert code == 0 and config["sz_folded"] is True and (out / "model.py").is_file()
    code, _, err = run(capsys, "convert", "--checkpoint", out, "--output", tmp_path / "twice", "--fold-scales")
    assert code == 2 and "folded already" in err and not (tmp_path / "twice").exists()


def test_generate_from_an_engine_streams_the_greedy_text(tiny_engine_folder, capsys):
    code, out, _ = run(capsys, "generate", "def __init__(self", "--engine", tiny_engine_folder, "--max-tokens", 12)
    from engines import load_engine

    with load_engine(tiny_engine_folder) as engine:
        assert code == 0 and out == engine.generate_text("def __init__(self", 12) + "\n"


def test_the_example_needs_no_download_and_fits_its_size():
    files = {p.name: p.stat().st_size for p in TINY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json"} <= set(files)
    assert sum(files.values()) <= 8_000_000
    losses = json.loads((TINY / "training.json").read_text())["held_out_nats_per_token"]
    assert losses["ngpt"] < losses["trigram"] < losses["unigram"]


@pytest.fixture(scope="module")
def rtx_engine(tmp_path_factory):
    from engines.build import build_engine

    return build_engine(GOLDEN / "gqa", "rtx-5090", tmp_path_factory.mktemp("rtx") / "engine")


@pytest.mark.parametrize(
    "card, code, told",
    [
        ("rtx-pro-6000", 0, "nothing in the manifest speaks against it"),
        ("12.0", 0, "nothing in the manifest speaks against it"),
        ("rtx-4090", 2, "built for another GPU: expected compute capability 12.0, found 8.9"),
        ("8.6", 2, "expected compute capability 12.0, found 8.6"),
    ],
)
def test_inspect_tells_whether_an_engine_would_load_on_a_card(capsys, rtx_engine, card, code, told):
    got, out, _ = run(capsys, "inspect", rtx_engine, "--on", card)
    assert got == code and told in out and "tensorrt_rtx" in out and "compute capability 12.0" in out


def test_inspect_counts_memory(capsys, rtx_engine, monkeypatch):
    from engines.device import Device

    for size, code in ((1 << 20, 2), (1 << 33, 0)):
        monkeypatch.setattr("engines.device.detect", lambda size=size: Device("a card", "12.0", size))
        got, out, _ = run(capsys, "inspect", rtx_engine, "--on", "here")
        assert got == code and ("does not fit the device's memory" in out) == (code == 2)


@pytest.mark.parametrize("card, told", [("cpu-int8", "has no GPU"), ("gtx", "unknown target 'gtx'")])
def test_inspect_refuses_what_is_not_a_card(capsys, rtx_engine, card, told):
    code, _, err = run(capsys, "inspect", rtx_engine, "--on", card)
    assert code == 2 and told in err


def test_inspect_and_auto_ask_nvidia_smi(capsys, rtx_engine, checkpoint, tmp_path, monkeypatch):
    """With a stand-in for nvidia-smi on the PATH that answers for a card that is not there."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 4090, 8.9, 24564'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    code, out, _ = run(capsys, "inspect", rtx_engine, "--on", "here")
    assert code == 2 and "NVIDIA GeForce RTX 4090: would not load" in out
    code, out, _ = run(capsys, "build", "--checkpoint", checkpoint, "--target", "auto", "--output", tmp_path / "e", "--no-verify")
    assert code == 0 and "target rtx-4090, fp16" in out


def test_auto_without_a_gpu_is_the_default_target(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("engines.device.shutil.which", lambda name: None)
    code, out, _ = run(capsys, "build", "--checkpoint", checkpoint, "--target", "auto", "--output", tmp_path / "e", "--no-verify")
    assert code == 0 and "target cpu-int8" in out


def test_an_engine_that_nobody_has_run_is_not_packaged(capsys, rtx_engine, tmp_path):
    code, _, err = run(capsys, "package", rtx_engine, "--output", tmp_path / "models")
    assert code == 2 and "--allow-unverified" in err
    assert not (tmp_path / "models").exists()
