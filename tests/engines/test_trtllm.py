"""`build --target *-trtllm`: converted and explained where trtllm-build is missing, built and described where a stand-in plays it."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from engines.backends.tensorrt_llm import build_arguments
from engines.build import build_engine
from engines.runtime.manifest import read_manifest, verify_files
from engines.target import Profile, load_target, target_names, with_kv_cache
from export.trtllm.parallel import Parallel
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import BuildError, OutputExistsError, TargetError, UnsupportedError
from scripts.cli import main
from tests.conftest import GOLDEN, ROOT, TINY
from tests.doubles import trtllm_build

TARGETS = [name for name in target_names() if name.endswith("-trtllm")]


@pytest.fixture
def program(tmp_path_factory, monkeypatch):
    """The stand-in for trtllm-build, on PATH."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "trtllm-build"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}:$PYTHONPATH" exec {sys.executable} -m tests.doubles.trtllm_build "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return script


def test_the_five_cards_have_targets():
    assert TARGETS == ["a100-trtllm", "b200-trtllm", "h100-trtllm", "h200-trtllm", "l40s-trtllm"]
    assert "int8" not in load_target("b200-trtllm").precisions  # TensorRT-LLM refuses it from compute capability 10.0 on


@pytest.mark.parametrize("name", TARGETS)
def test_every_precision_makes_options_that_trtllm_build_has(name, tmp_path):
    with open_checkpoint(TINY) as checkpoint:
        for precision in load_target(name).precisions:
            arguments = build_arguments(checkpoint.spec, load_target(name, precision), Parallel(2))
            folders = ["--checkpoint_dir", "a", "--output_dir", "b", "--model_cls_file", "c"]
            options = trtllm_build.parser().parse_args([*folders, *arguments])
            assert options.max_num_tokens >= options.max_seq_len or options.use_paged_context_fmha == "enable"
            assert options.use_fp8_context_fmha == "disable" and options.kv_cache_type == "paged"


def test_an_fp8_cache_goes_without_paged_context_attention():
    """Then a prompt is one step, so a step takes the longest."""
    with open_checkpoint(TINY) as checkpoint:
        for precision in ("bf16", "fp8"):
            target = with_kv_cache(load_target("h100-trtllm", precision), "fp8")
            target = dataclasses.replace(target, profile=Profile(prefill_tokens=16, decode_batch=4))
            folders = ["--checkpoint_dir", "a", "--output_dir", "b", "--model_cls_file", "c"]
            options = trtllm_build.parser().parse_args([*folders, *build_arguments(checkpoint.spec, target, Parallel(2))])
            assert (options.context_fmha, options.use_paged_context_fmha) == ("enable", "disable")
            assert options.use_fp8_context_fmha == "disable" and options.max_num_tokens == checkpoint.spec.max_length


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_an_engine_with_an_fp8_cache_is_built_and_described(precision, tmp_path, program, capsys):
    command = ["build", "--checkpoint", str(TINY), "--target", "h100-trtllm", "--tp", "2", "--kv-cache", "fp8"]
    command += ["--precision", precision, "--output", str(tmp_path / "engine")]
    assert main([*command, "--dry-run"]) == 0
    assert "cache float8_e4m3" in capsys.readouterr().out and not (tmp_path / "engine").exists()
    assert main(command) == 0
    manifest = read_manifest(tmp_path / "engine")
    assert manifest.model.cache_dtype == "float8_e4m3" and manifest.precision["cache"] == "float8_e4m3"
    config = json.loads((tmp_path / "engine" / "checkpoint" / "config.json").read_text())
    assert config["quantization"]["kv_cache_quant_algo"] == "FP8"


@pytest.mark.parametrize(
    ("target", "precision", "named"),
    [("a100-trtllm", "bf16", "8.9 or higher, found a100-trtllm, 8.0"), ("h100-trtllm", "fp32", "found fp32"),
     ("h100", "fp16", "a TensorRT-LLM target"), ("cpu-int8", None, "a TensorRT-LLM target")],
)  # fmt: skip
def test_an_fp8_cache_is_refused_where_it_cannot_be(target, precision, named, tmp_path, capsys):
    command = ["build", "--checkpoint", str(TINY), "--target", target, "--kv-cache", "fp8", "--output", str(tmp_path / "engine")]
    command += ["--precision", precision] if precision else []
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "--kv-cache fp8" in error and named in error and not list(tmp_path.iterdir())


def test_only_two_types_of_cache_are_known():
    with pytest.raises(TargetError, match="int8"):
        with_kv_cache(load_target("h100-trtllm"), "int8")
    for name in ("l40s-trtllm", "b200-trtllm"):
        assert with_kv_cache(load_target(name), "fp8").precision.cache == "float8_e4m3"


def test_without_trtllm_build_the_checkpoint_and_the_commands_are_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    out = tmp_path / "engine"
    code = main(["build", "--checkpoint", str(TINY), "--target", "h100-trtllm", "--tp", "2", "--output", str(out)])
    printed = capsys.readouterr().out
    assert code == 0
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {p.name for p in out.iterdir()} == {"BUILD.md", "build.sh", "checkpoint"} | copied
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == ["config.json", "rank0.safetensors", "rank1.safetensors"]
    assert "./build.sh" in printed and str(out / "checkpoint") in printed and "Not executed" in printed
    subprocess.run(["bash", "-n", out / "build.sh"], check=True)


def test_build_sh_is_the_command(tmp_path, monkeypatch, program):
    """It runs the program with the class file of the installed package, from any working directory."""
    path, environment = os.environ["PATH"], dict(os.environ)
    monkeypatch.setenv("PATH", os.defpath)
    out = build_engine(GOLDEN / "gqa", "l40s-trtllm", tmp_path / "engine", pp=2)
    link = tmp_path / "python3"
    link.symlink_to(sys.executable)
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{path}", "PYTHONPATH": str(ROOT)}
    subprocess.run([out / "build.sh"], check=True, cwd="/", env=environment)
    assert sorted(p.name for p in (out / "engine").iterdir()) == ["config.json", "rank0.engine", "rank1.engine"]


def test_with_trtllm_build_the_result_is_an_engine_folder(tmp_path, program, capsys):
    out = build_engine(TINY, "h200-trtllm", tmp_path / "engine", tp=2, precision="fp8", name="tiny")
    manifest = read_manifest(out)
    verify_files(out, manifest)
    assert {"engine/rank0.engine", "engine/rank1.engine", "engine/config.json", "checkpoint/config.json"} <= set(manifest.files)
    assert manifest.graph == "engine/rank0.engine" and manifest.tools["tensorrt_llm"] == "1.2.1"
    assert (manifest.flags["tp"], manifest.flags["pp"]) == (2, 1) and manifest.parity is None
    assert manifest.target.runtime == "tensorrt_llm" and not manifest.target.executed
    assert main(["inspect", str(out)]) == 0
    assert "cache paged" in capsys.readouterr().out


def test_such_an_engine_goes_into_a_repository_of_tensorrt_llms_backend(tmp_path, program, capsys):
    out = build_engine(TINY, "h100-trtllm", tmp_path / "engine", tp=2)
    assert main(["package", str(out), "--output", str(tmp_path / "models")]) == 2  # nobody has verified it
    assert "--allow-unverified" in capsys.readouterr().err
    assert main(["package", str(out), "--output", str(tmp_path / "models"), "--allow-unverified"]) == 0
    served = tmp_path / "models" / "tensorrt_llm" / "1" / "engine" / "engine"
    assert {path.name for path in served.iterdir()} == {"config.json", "rank0.engine", "rank1.engine"}
    config = (tmp_path / "models" / "tensorrt_llm" / "config.pbtxt").read_text()
    assert 'backend: "tensorrtllm"' in config and "/models/tensorrt_llm/1/engine/engine" in config


def test_such_an_engine_is_not_run_here(tmp_path, program):
    from engines import load_engine
    from engines.runtime.errors import EngineFileError

    out = build_engine(TINY, "h100-trtllm", tmp_path / "engine")
    with pytest.raises(EngineFileError, match="tensorrt_llm.*runs its engines itself"):
        load_engine(out)


def test_a_build_that_fails_shows_its_last_lines_and_leaves_nothing(tmp_path, program, monkeypatch):
    monkeypatch.setenv("TRTLLM_FAIL", "1")
    with pytest.raises(BuildError, match=r"(?s)exit code 1, without rank0.engine, rank1.engine.*says the stand-in"):
        build_engine(TINY, "h100-trtllm", tmp_path / "engine", tp=2)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path, capsys):
    command = ["build", "--checkpoint", str(TINY), "--output", str(tmp_path / "engine"), "--dry-run", "--target"]
    assert main([*command, "h100-trtllm", "--tp", "2"]) == 0
    printed = capsys.readouterr().out
    for part in ("2 rank(s)", "rank 1: layers 0..", "trtllm-build --checkpoint_dir", "--model_cls_name NGPTForCausalLM"):
        assert part in printed
    assert not list(tmp_path.iterdir())
    assert main([*command, "h100-trtllm", "--tp", "3"]) == 2
    assert "num_key_value_heads" in capsys.readouterr().err
    assert main([*command, "cpu-int8", "--tp", "2"]) == 2 and "is one device's" in capsys.readouterr().err


def test_refusals_come_before_anything_is_written(tmp_path):
    for target, options, error, named in (
        ("h100-trtllm", {"tp": 3}, UnsupportedError, "num_key_value_heads"),
        ("b200-trtllm", {"precision": "int8"}, TargetError, "int8"),
        ("cpu-int8", {"tp": 2}, TargetError, "--tp 2"),
    ):
        with pytest.raises(error, match=named):
            build_engine(TINY, target, tmp_path / "engine", **options)
    (tmp_path / "engine").mkdir()
    with pytest.raises(OutputExistsError):
        build_engine(TINY, "h100-trtllm", tmp_path / "engine")
    assert [p.name for p in tmp_path.iterdir()] == ["engine"] and not list((tmp_path / "engine").iterdir())


def test_what_is_converted_says_what_it_needs(tmp_path, monkeypatch):
    """The engine's configuration is self-contained: the spec comes back from it as it was."""
    from export.trtllm.config import spec_from

    monkeypatch.setenv("PATH", os.defpath)
    out = build_engine(GOLDEN / "llama3-rope-bias", "a100-trtllm", tmp_path / "engine", precision="fp16")
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    with open_checkpoint(GOLDEN / "llama3-rope-bias") as checkpoint:
        assert spec_from(config["ngpt"]) == checkpoint.spec
