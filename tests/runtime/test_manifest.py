"""Manifests: what is written comes back, and every wrong field is named."""

from __future__ import annotations

import copy
import functools
import json
import os
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
        ("schema_version", 3),
        ("schema_version", 0),
        ("precision", {}),
        ("precision", KeyError),
        ("precision", "fp32"),
        ("precision/arithmetic", 32),
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
        ("parity/verdict", ["pass"]),
        ("parity", "pass"),
        ("schema_version", 1.0),
        ("schema_version", [1]),
        ("name", "x" * 5000),
        ("name", ["double"]),
        ("target/cache", ["in-place"]),
        ("target/note", 3),
        ("target/runtime", {}),
        ("model/max_length", 10**400),
        ("model/num_layers", 2**31 - 1),
        ("model/vocab_size", 2**31),
        ("model/eos_token_ids", [[1]]),
        ("graph", ["model.onnx"]),
        ("graph", {"model.onnx": 1}),
        ("files/model.onnx/bytes", 2**63),
        ("files/model.onnx/bytes", 3.0),
        ("files/other.onnx", "a" * 64),
        ("files/model.onnx/sha256", ["a"] * 64),
        ("digests/weights", "x" * 5000),
        ("tools/numpy", {"version": "1.26"}),
        ("flags", [1]),
        ("flags/nested", functools.reduce(lambda inner, _: [inner], range(40), 1)),
    ],
)
def test_a_wrong_field_is_named(path: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(EngineFileError) as caught:
        read_manifest(tmp_path)
    named = path.split("/")
    expected = "graph" if path == "files/model.onnx" else named[0] if named[0] == "files" else named[-1]
    if path == "flags/nested":
        expected = "flags"
    assert expected in caught.value.what and caught.value.remedy and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/../../x",
        "a//b",
        "",
        ".",
        "a\\b",
        "C:x",
        "a\0b",
        "./a",
        "\x1b[31mx",
        "a\nb",
        "\u202ex",
        "\ud800",
        'a"b',
        "x" * 5000,
    ],
)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    data = full()
    data["files"][name] = {"bytes": 1, "sha256": "a" * 64}
    with pytest.raises(EngineFileError, match="inside the engine folder") as caught:
        Manifest.from_dict(data)
    assert len(str(caught.value)) < 1000


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


GOOD = json.dumps(full()).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b'"' + b"x" * MAX_MANIFEST_BYTES + b'"', b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"double", b"doubl\xe9"),
        *(GOOD.replace(b'"flags": {', b'"flags": {' + flags) for flags in (b'"a": NaN', b'"a": -Infinity', b'"a": 1e999')),
        *(GOOD.replace(b'"flags": {', b'"flags": {' + flags) for flags in (b'"a": 1, "a": 2', b'"a": ' + b"9" * 6000)),
    ],
)  # fmt: skip
def test_files_that_are_no_manifests(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(EngineFileError) as caught:
        read_manifest(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "broken link"])
def test_a_manifest_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "manifest.json"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)  # opening it would wait for ever
        case _:
            path.symlink_to("manifest.json" if kind == "loop" else "nowhere")
    with pytest.raises(EngineFileError, match=r"manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(EngineFileError, match="name too long"):
        read_manifest(tmp_path / ("x" * 300))


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "broken link", "unreadable"])
def test_a_listed_file_that_is_none(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_engine(tmp_path / "engine")
    manifest, path = read_manifest(folder), folder / "model.onnx"
    if kind == "unreadable":
        monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    else:
        path.unlink()
        match kind:
            case "folder":
                path.mkdir()
            case "pipe":
                os.mkfifo(path)
            case _:
                path.symlink_to("model.onnx" if kind == "loop" else "nowhere")
    with pytest.raises(EngineFileError, match=r"model\.onnx"):
        verify_files(folder, manifest)


def test_checking_tells_how_far_it_is(tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "engine")
    told: list[tuple[str, float]] = []
    verify_files(folder, read_manifest(folder), progress=lambda what, done: told.append((what, done)))
    assert told == [("checking model.onnx", 1.0)]


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    manifest = Manifest.from_dict(full())
    write_manifest(tmp_path, manifest)
    before = (tmp_path / "manifest.json").read_bytes()
    bad = Manifest.from_dict(full() | {"flags": {"x": float("nan")}})
    with pytest.raises(ValueError):
        write_manifest(tmp_path, bad)
    assert (tmp_path / "manifest.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
