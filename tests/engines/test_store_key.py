"""The key of a stored engine: anything that changes the engine changes it, and nothing else does."""

import dataclasses
import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engines.copying
import engines.identity
from engines.identity import components
from engines.key import differences, key_of
from engines.target import Profile, load_target, with_kv_cache
from export.precision import Format
from export.trtllm.parallel import Parallel
from ngpt.checkpoint import open_checkpoint
from tests.conftest import GOLDEN, TINY

GQA = GOLDEN / "gqa"


def parts_of(checkpoint=TINY, target="cpu-int8", parallel=None, name="tiny", tools=None, **opening):
    from engines.backends import Job

    target = load_target(target) if isinstance(target, str) else target
    with open_checkpoint(checkpoint, **opening) as opened:
        return components(Job(opened, target, parallel or Parallel()), name, {"onnx-ir": "1"} if tools is None else tools)


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(TINY, tmp_path / "copy")


def edited(file, before, after):
    data = file.read_bytes()
    assert before in data
    file.write_bytes(data.replace(before, after, 1))


def test_the_same_build_has_the_same_key_wherever_the_checkpoint_lies(copied):
    assert key_of(parts_of()) == key_of(parts_of()) == key_of(parts_of(copied))
    assert len(key_of(parts_of())) == 64 and json.loads(json.dumps(parts_of())) == parts_of()


def test_every_byte_of_the_checkpoint_is_part_of_the_key(copied):
    seen = {key_of(parts_of())}
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    for place in (-1, len(data) // 2):
        data[place] ^= 1
        weights.write_bytes(data)
        seen.add(key_of(parts_of(copied)))
    edited(copied / "tokenizer_config.json", b"{", b"{ ")
    seen.add(key_of(parts_of(copied)))
    config = json.loads((copied / "config.json").read_text())
    for change in ({"pretraining_tp": 1}, {"max_position_embeddings": config["max_position_embeddings"] // 2}):
        config |= change
        (copied / "config.json").write_text(json.dumps(config))
        seen.add(key_of(parts_of(copied)))
    assert len(seen) == 6


OPTIONS = [
    {"name": "other"},
    {"off_sphere": "allow"},
    {"eos": [5]},
    {"eos": [5, 6]},
    {"tools": {"onnx-ir": "2"}},
    {"tools": {}},
    {"target": "cpu-int4"},
    {"target": "cpu-fp32"},
    {"target": "onnx-portable"},
    {"target": "h100-trtllm"},
    {"target": "h200-trtllm"},
    {"target": "h100-trtllm", "parallel": Parallel(2, 1)},
    {"target": "h100-trtllm", "parallel": Parallel(1, 2)},
    {"target": with_kv_cache(load_target("h100-trtllm"), "fp8")},
    {"target": load_target("h100-trtllm", "fp8")},
    {"target": "h100"},
]


def test_every_option_is_part_of_the_key():
    assert len({key_of(parts_of(**options)) for options in [{}, *OPTIONS]}) == len(OPTIONS) + 1


def test_ends_that_are_given_count_even_if_they_are_the_checkpoints_own():
    """They are written into another file."""
    with open_checkpoint(TINY) as opened:
        own = list(opened.text.ends)
    assert own and key_of(parts_of(eos=own)) != key_of(parts_of())


def test_every_field_of_a_target_and_of_its_precision_is_part_of_the_key():
    """A field that is added later and that this test does not know fails it."""
    target = load_target("h100")
    others = {
        "name": "x", "description": "x", "note": "x", "runtime": "tensorrt_rtx", "form": "native", "cache": "in-place",
        "executed": True, "providers": ("x",), "precisions": ("fp16",), "profile": Profile(7, 7),
        "gpu": dataclasses.replace(target.gpu, memory_gb=1.0), "precision": load_target("h100", "int8").precision,
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(target)}
    plain = engines.identity._described(target)
    for name, value in others.items():
        if value != getattr(target, name):
            changed = object.__new__(type(target))  # some values do not go together: here only the spelling counts
            for field in dataclasses.fields(target):
                object.__setattr__(changed, field.name, value if field.name == name else getattr(target, field.name))
            assert engines.identity._described(changed) != plain, name
    precision = {
        "name": "x", "arithmetic": "float32", "projections": Format("int8", 32), "head": Format("int8", 32),
        "embedding": Format("float32"), "cache": "float8_e4m3", "activations": Format("int8", 32), "loader_quantises": True,
    }  # fmt: skip
    assert set(precision) == {field.name for field in dataclasses.fields(target.precision)}
    for name, value in precision.items():
        changed = dataclasses.replace(target, precision=dataclasses.replace(target.precision, **{name: value}))
        assert engines.identity._described(changed) != plain, name


def test_the_gpu_and_what_compiles_for_it_are_part_of_the_key(monkeypatch, tmp_path):
    from engines.device import Device

    seen = {key_of(parts_of(target="h100"))}
    for device in (Device("H100", "9.0", 1), Device("H100", "9.1", 1), Device("H200", "9.0", 1)):
        monkeypatch.setattr(engines.identity, "detect", lambda device=device: device)
        seen.add(key_of(parts_of(target="h100")))
    monkeypatch.setattr("export.plugins.compile.compiler", lambda: "NVRTC 99.9")
    seen.add(key_of(parts_of(target="h100")))
    assert len(seen) == 5
    without = key_of(parts_of(target="h100-trtllm"))
    (tmp_path / "trtllm-build").write_text("#!/bin/sh\n")
    (tmp_path / "trtllm-build").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert key_of(parts_of(target="h100-trtllm")) != without


def test_code_libraries_and_python_are_part_of_the_key(monkeypatch):
    plain, seen = parts_of(), set()
    for name in ("code_digest", "_digest_of_files"):
        with monkeypatch.context() as patch:
            patch.setattr(engines.identity, name, lambda *_: "sha256:other")
            seen.add(key_of(parts_of()))
    real = engines.identity.importlib.metadata.version
    for package in plain["libraries"]:
        with monkeypatch.context() as patch:
            patch.setattr(
                engines.identity.importlib.metadata,
                "version",
                lambda asked, package=package: "0" if asked == package else real(asked),
            )
            seen.add(key_of(parts_of()))
    for name, value in (("version_info", type("V", (), {"major": 3, "minor": 99})),):
        with monkeypatch.context() as patch:
            patch.setattr(engines.identity.sys, name, value)
            seen.add(key_of(parts_of()))
    with monkeypatch.context() as patch:
        patch.setattr(engines.identity.platform, "machine", lambda: "riscv64")
        seen.add(key_of(parts_of()))
    assert len(seen - {key_of(plain)}) == len(plain["libraries"]) + 4
    assert {"numpy", "onnx-ir", "onnxruntime", "torch", "transformers", "ml-dtypes", "protobuf"} <= set(plain["libraries"])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
PARTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)


@settings(max_examples=150, deadline=None)
@given(PARTS, PARTS)
def test_keys_are_equal_only_for_equal_parts_and_the_difference_can_be_told(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (key_of(one) == key_of(other)) == same
    assert key_of(dict(reversed(one.items()))) == key_of(one)
    assert not differences(one, dict(one))
