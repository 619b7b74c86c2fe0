"""Manifests: what is written comes back, and every wrong field is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from engines.runtime import EngineFileError, Manifest, read_manifest, verify_files, write_manifest
from engines.runtime.manifest import MAX_MANIFEST_BYTES, contained_path
from tests.runtime.making import manifest_dict, write_engine


def full() -> dict[str, Any]:
    data = manifest_dict()
    data["files"] = {"model.onnx": {"bytes": 3, "sha256": "a" * 64}}
    data["parity"] = {"verdict": "pass", "report": "parity.json", "angle_max": 1e-6}
    return data


def changed(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(full())
    *parents, last = path.split("/")
    table = data
    for key in parents:
        table = table[key]
    if value is KeyError:
        del table[last]
    else:
        table[last] = value
    return data


def test_round_trip(tmp_path: Path) -> None:
    manifest = Manifest.from_dict(full())
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text()) == full()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert manifest.target.providers == ("CPUExecutionProvider",) and manifest.model.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", 2),
        ("schema_version", True),
        ("name", ""),
        ("name", KeyError),
        ("surprise", 1),
        ("target", []),
        ("target/cache", "elsewhere"),
        ("target/executed", "yes"),
        ("target/providers", "CPUExecutionProvider"),
        ("target/providers", [1]),
        ("target/runtime", KeyError),
        ("target/surprise", 1),
        ("model/vocab_size", 0),
        ("model/vocab_size", 1.5),
        ("model/num_layers", True),
        ("model/num_kv_heads", 3),
        ("model/max_length", KeyError),
        ("model/eos_token_ids", 2),
        ("model/eos_token_ids", [23]),
        ("model/bos_token_id", -1),
        ("graph", "other.onnx"),
        ("files", []),
        ("files/model.onnx", KeyError),
        ("files/model.onnx/bytes", -1),
        ("files/model.onnx/sha256", "A" * 64),
        ("files/model.onnx/sha256", "a" * 63),
        ("files/model.onnx/bytes", KeyError),
        ("digests/weights", 1),
        ("tools", None),
        ("parity/verdict", "maybe"),
        ("parity", "pass"),
    ],
)
def test_a_wrong_field_is_named(path: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(EngineFileError) as caught:
        read_manifest(tmp_path)
    named = path.split("/")
    expected = "graph" if path == "files/model.onnx" else named[0] if named[0] == "files" else named[-1]
    assert expected in caught.value.what and caught.value.remedy


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "a\\b", "C:x", "a\0b", "./a"])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    data = full()
    data["files"][name] = {"bytes": 1, "sha256": "a" * 64}
    with pytest.raises(EngineFileError, match="inside the engine folder"):
        Manifest.from_dict(data)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("outside")
    folder = write_engine(tmp_path / "engine")
    manifest = read_manifest(folder)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(tmp_path / "secret")
    with pytest.raises(EngineFileError, match="a file inside"):
        verify_files(folder, manifest)
    with pytest.raises(EngineFileError):
        contained_path(folder, "model.onnx")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b'"' + b"x" * MAX_MANIFEST_BYTES + b'"'])
def test_files_that_are_no_manifests(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(EngineFileError):
        read_manifest(tmp_path)


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    manifest = Manifest.from_dict(full())
    write_manifest(tmp_path, manifest)
    before = (tmp_path / "manifest.json").read_bytes()
    bad = Manifest.from_dict(full() | {"flags": {"x": float("nan")}})
    with pytest.raises(ValueError):
        write_manifest(tmp_path, bad)
    assert (tmp_path / "manifest.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
