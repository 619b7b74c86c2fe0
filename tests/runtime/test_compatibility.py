"""What a manifest alone says about where a TensorRT plan can run; no library and no GPU is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.runtime.compatibility import check_slots, memory_needed, problems
from engines.runtime.errors import EngineFileError
from engines.runtime.manifest import Manifest, read_manifest
from tests.engines.tensorrt_making import VERSION, write_engine
from tests.runtime.making import manifest_dict

# 2 layers, 4 key heads of 32 channels: a row of 64 positions of float16 is 16384 bytes.
SPEC = SimpleNamespace(vocab_size=100, hidden_size=128, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=32)
HERE: dict[str, Any] = {"tensorrt_version": VERSION, "compute_capability": "12.0", "memory_bytes": 1 << 30}
UNKNOWN: dict[str, Any] = {"tensorrt_version": None, "compute_capability": None, "memory_bytes": None}


def manifest(folder: Path, **changes: Any) -> Manifest:
    return read_manifest(write_engine(folder / "engine", SPEC, **{"cache_dtype": "float16"} | changes))


def test_nothing_is_wrong_where_it_was_built_and_what_is_unknown_is_not_checked(tmp_path: Path) -> None:
    assert problems(manifest(tmp_path), **HERE) == []
    assert problems(manifest(tmp_path), **UNKNOWN) == []
    anywhere = manifest(tmp_path, flags={"compute_capability": None})
    assert problems(anywhere, **HERE | {"compute_capability": "8.6"}) == []


def test_every_problem_is_told_with_what_to_do(tmp_path: Path) -> None:
    found = problems(manifest(tmp_path), tensorrt_version="1.8", compute_capability="8.6", memory_bytes=65_000)
    assert [(error.expected, error.found) for error in found] == [
        (VERSION, "1.8"),
        ("compute capability 12.0", "8.6"),
        ("at least 65557 bytes (plan, and the cache of one sequence)", "65000 bytes"),
    ]
    assert all(error.remedy for error in found)
    assert len(problems(manifest(tmp_path), **HERE | {"memory_bytes": 65_557})) == 0


def test_memory_is_the_plan_and_the_cache(tmp_path: Path) -> None:
    plan = 21
    assert memory_needed(manifest(tmp_path), 3) == plan + 2 * 2 * 16384 * 3
    assert memory_needed(manifest(tmp_path, cache="past-present"), 3) == plan + 2 * 2 * 16384 * 3 * 2
    assert memory_needed(manifest(tmp_path, cache_dtype="float32"), 1) == plan + 2 * 2 * 32768


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cache": "growing"}, "target.cache"),
        ({"cache_dtype": "float8"}, "model.cache_dtype"),
        ({"flags": {"decode_batch": 0}}, "flags.decode_batch"),
        ({"flags": {"decode_batch": True}}, "flags.decode_batch"),
        ({"flags": {"prefill_tokens": "8"}}, "flags.prefill_tokens"),
        ({"flags": {"compute_capability": 12.0}}, "flags.compute_capability"),
        ({"max_length": 63}, "model.max_length"),
        ({"target": {"runtime": "tensorrt"}}, "tools.tensorrt"),
    ],
)
def test_a_manifest_nothing_can_be_made_of_is_named(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    if field == "model.max_length":
        changes = changes | {"model": {"num_kv_heads": 1, "head_dim": 2, "num_heads": 1}}
    bad = manifest(tmp_path, **changes)
    (problem,) = problems(bad, **HERE)
    assert field in problem.what
    with pytest.raises(EngineFileError, match=field):
        check_slots(bad, 1)


def test_slots(tmp_path: Path) -> None:
    check_slots(manifest(tmp_path), 4)
    with pytest.raises(EngineFileError, match="at most 4.*found 5"):
        check_slots(manifest(tmp_path), 5)


def test_engines_of_other_runtimes_have_nothing_to_check() -> None:
    other = manifest_dict(files={"model.onnx": {"bytes": 1, "sha256": "0" * 64}})
    assert problems(Manifest.from_dict(other), **HERE) == []
    check_slots(Manifest.from_dict(other), 10_000)
