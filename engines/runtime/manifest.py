"""The manifest of an engine folder: read, validated, written, and held against the files it names."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import EngineFileError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
_CACHES = ("in-place", "past-present", "growing", "paged")


@dataclass(frozen=True)
class TargetInfo:
    """Where and how the engine runs. `executed` says whether this engine was run where it was built."""

    name: str
    runtime: str
    providers: tuple[str, ...]
    precision: str
    cache: str
    executed: bool
    note: str = ""

    def __post_init__(self) -> None:
        for key in ("name", "runtime", "precision"):
            _text(f"target.{key}", getattr(self, key))
        if not isinstance(self.note, str):
            raise _wrong("target.note", "a text", self.note)
        if not isinstance(self.executed, bool):
            raise _wrong("target.executed", "true or false", self.executed)
        if self.cache not in _CACHES:
            raise _wrong("target.cache", " or ".join(_CACHES), self.cache)
        if not isinstance(self.providers, tuple):
            raise _wrong("target.providers", "a list of texts", self.providers)
        for item in self.providers:
            _text("target.providers", item)


@dataclass(frozen=True)
class ModelInfo:
    """Sizes of the model; `max_length` is the number of positions of one slot's cache, in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    cache_dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    def __post_init__(self) -> None:
        _text("model.architecture", self.architecture)
        _text("model.cache_dtype", self.cache_dtype)
        for key in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_length"):
            value = getattr(self, key)
            if not _is_int(value) or value < 1:
                raise _wrong(f"model.{key}", "an integer of at least 1", value)
        if self.num_heads % self.num_kv_heads:
            raise _wrong("model.num_kv_heads", f"a divisor of num_heads ({self.num_heads})", self.num_kv_heads)
        if not isinstance(self.eos_token_ids, tuple):
            raise _wrong("model.eos_token_ids", "a list of token ids", self.eos_token_ids)
        named = [("model.eos_token_ids", t) for t in self.eos_token_ids]
        optional = {"model.bos_token_id": self.bos_token_id, "model.pad_token_id": self.pad_token_id}
        for key, token in named + [(k, t) for k, t in optional.items() if t is not None]:
            if not _is_int(token) or not 0 <= token < self.vocab_size:
                raise _wrong(key, f"a token id in 0..{self.vocab_size - 1}", token)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (lower-case hex) of one file."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not _is_int(self.bytes) or self.bytes < 0:
            raise _wrong("files.bytes", "a size in bytes", self.bytes)
        text = self.sha256
        if not isinstance(text, str) or len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise _wrong("files.sha256", "64 lower-case hex digits", text)


@dataclass(frozen=True)
class Manifest:
    """What an engine folder holds and where it came from. Raises EngineFileError on a bad field."""

    name: str
    created: str
    target: TargetInfo
    model: ModelInfo
    graph: str
    digests: Mapping[str, str]
    tools: Mapping[str, str]
    files: Mapping[str, FileEntry]
    flags: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION or isinstance(self.schema_version, bool):
            raise EngineFileError(
                "manifest schema_version",
                expected=str(SCHEMA_VERSION),
                found=repr(self.schema_version),
                remedy="Build the engine again with this version of the package.",
            )
        _text("name", self.name)
        _text("created", self.created)
        for key, table in (("digests", self.digests), ("tools", self.tools)):
            for item, value in _mapping(key, table).items():
                if not isinstance(value, str):
                    raise _wrong(f"{key}.{item}", "a text", value)
        _mapping("flags", self.flags)
        for name in _mapping("files", self.files):
            check_name(name)
        if self.graph not in self.files:
            raise _wrong("graph", "a name listed under files", self.graph)
        if self.parity is not None:
            verdict = _mapping("parity", self.parity).get("verdict")
            if verdict not in ("pass", "fail"):
                raise _wrong("parity.verdict", "pass or fail", verdict)

    @classmethod
    def from_dict(cls, data: object) -> Manifest:
        """Validates the parsed JSON. Raises EngineFileError naming the first bad key."""
        table = dict(_keys("manifest", data, cls))
        table["target"] = _build(TargetInfo, "target", table["target"], lists=("providers",))
        table["model"] = _build(ModelInfo, "model", table["model"], lists=("eos_token_ids",))
        files = _mapping("files", table["files"])
        table["files"] = {n: _build(FileEntry, f"files.{n}", e) for n, e in files.items()}
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict(to_dict(m)) == m`."""
        data = {"schema_version": self.schema_version}
        data.update((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "schema_version")
        target = asdict(self.target)
        target["providers"] = list(self.target.providers)
        model = asdict(self.model)
        model["eos_token_ids"] = list(self.model.eos_token_ids)
        tables: dict[str, Any] = {k: dict(getattr(self, k)) for k in ("digests", "tools", "flags")}
        tables["files"] = {n: asdict(e) for n, e in sorted(self.files.items())}
        parity = None if self.parity is None else dict(self.parity)
        return {**data, **tables, "target": target, "model": model, "parity": parity}


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and validates `folder`/manifest.json (at most 1 MiB). Raises EngineFileError."""
    path = Path(folder) / MANIFEST_NAME
    remedy = "Point at a folder that the build wrote."
    if not path.is_file():
        raise EngineFileError(f"{path}", expected="an engine's manifest", found="no such file", remedy=remedy)
    raw = read_bounded(path, MAX_MANIFEST_BYTES)
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise EngineFileError(f"{path}", expected="JSON in UTF-8", found=str(error), remedy=remedy) from error
    return Manifest.from_dict(data)


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Writes manifest.json atomically (a neighbour file, then a rename) and returns its path."""
    path = Path(folder) / MANIFEST_NAME
    temporary = path.with_name(f".{MANIFEST_NAME}.{os.getpid()}")
    text = json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def describe_file(path: str | Path) -> FileEntry:
    """Size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with Path(path).open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def check_name(name: object) -> str:
    """A relative POSIX path that stays in its folder; anything else raises EngineFileError."""
    good = isinstance(name, str) and name != "" and not set(name) & {"\\", "\0", ":"}
    if good and isinstance(name, str):
        parts = name.split("/")
        good = not PurePosixPath(name).is_absolute() and not set(parts) & {"", ".", ".."}
    if not good or not isinstance(name, str):
        raise _wrong("files", "relative names inside the engine folder", name)
    return name


def contained_path(folder: str | Path, name: str) -> Path:
    """The path of a named file of the engine; raises EngineFileError if a link leads out of the folder."""
    root = Path(folder).resolve()
    path = (root / check_name(name)).resolve()
    if not path.is_relative_to(root):
        raise EngineFileError(
            f"engine file {name!r}",
            expected=f"a file inside {root}",
            found=f"{path}",
            remedy="Replace the link with the file itself.",
        )
    return path


def verify_files(folder: str | Path, manifest: Manifest, *, digests: bool = True) -> None:
    """Compares every listed file with its size and, unless `digests` is False, its SHA-256.

    Raises EngineFileError naming the first bad one.
    """
    remedy = "Copy the engine folder again, or build it again."
    for name, entry in manifest.files.items():
        path = contained_path(folder, name)
        if not path.is_file():
            raise EngineFileError(f"engine file {name!r}", expected="a file", found="nothing", remedy=remedy)
        size = path.stat().st_size
        if size != entry.bytes:
            raise EngineFileError(f"engine file {name!r}", expected=f"{entry.bytes} bytes", found=f"{size} bytes", remedy=remedy)
        if digests and (found := describe_file(path)) != entry:
            raise EngineFileError(f"engine file {name!r}", expected=f"SHA-256 {entry.sha256}", found=found.sha256, remedy=remedy)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes; a larger one raises EngineFileError unread."""
    with path.open("rb") as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise EngineFileError(
            f"{path}", expected=f"at most {limit} bytes", found="more", remedy="This is not a file that the build wrote."
        )
    return raw


def _wrong(key: str, expected: str, found: object) -> EngineFileError:
    shown = repr(found)
    return EngineFileError(
        f"manifest field {key!r}",
        expected=expected,
        found=shown[:200],
        remedy="Build the engine again; do not edit the manifest by hand.",
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(key: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise _wrong(key, "a text that is not empty", value)


def _mapping(key: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(key, "a table", value)
    return value


def _keys(key: str, value: object, kind: type) -> Mapping[str, Any]:
    """The table, after its keys are held against the fields of the dataclass `kind`."""
    table = _mapping(key, value)
    allowed = {f.name for f in fields(kind)}
    needed = allowed - {"note", "flags", "parity"}
    if unknown := sorted(set(table) - allowed):
        raise _wrong(f"{key}.{unknown[0]}", "no such key", table[unknown[0]])
    if missing := sorted(needed - set(table)):
        raise _wrong(f"{key}.{missing[0]}", "a value", None)
    return table


def _build(kind: type, key: str, value: object, lists: tuple[str, ...] = ()) -> Any:
    table = dict(_keys(key, value, kind))
    for name in lists:
        if isinstance(table[name], list):
            table[name] = tuple(table[name])
    return kind(**table)
