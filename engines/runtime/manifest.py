"""The manifest of an engine folder: read, validated, written, and held against the files it names."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import EngineFileError

SCHEMA_VERSION = 2
_OLDER = (1,)
"""Read as well: version 1 (ngpt-deploy 0.1) has no `precision`, and flags that said the same."""
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_LAYERS = 10_000
"""Each costs objects when the engine is loaded, before its graph can contradict."""
_MAX_INT = (1 << 31) - 1  # of a model's sizes
_MAX_TEXT, _MAX_KEY, _MAX_DEPTH = 4096, 200, 32
_MAX_SETTING = float(1 << 32)
Progress = Callable[[str, float], None]
"""Called as progress(what is being done, fraction done of all)."""
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
        _text("target.note", self.note, empty=True)
        if not isinstance(self.executed, bool):
            raise _wrong("target.executed", "true or false", self.executed)
        if not isinstance(self.cache, str) or self.cache not in _CACHES:
            raise _wrong("target.cache", " or ".join(_CACHES), self.cache)
        if not isinstance(self.providers, tuple) or (self.runtime == "onnxruntime" and not self.providers):
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
            most = MAX_LAYERS if key == "num_layers" else _MAX_INT
            if not _is_int(value) or not 1 <= value <= most:
                raise _wrong(f"model.{key}", f"an integer from 1 to {most}", value)
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
        if not _is_int(self.bytes) or not 0 <= self.bytes < 1 << 63:
            raise _wrong("files.bytes", "a size in bytes", self.bytes)
        text = self.sha256
        if not isinstance(text, str) or len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise _wrong("files.sha256", "64 lower-case hex digits", text)


@dataclass(frozen=True)
class Manifest:
    """What an engine folder holds and where it came from. Raises EngineFileError on a bad field.

    `generation` holds the sampling settings of the checkpoint's generation_config.json under its names (temperature, top_p,
    ...), for endpoints that apply a model's own defaults. `precision` says what `target.precision` stands for: the types and
    formats of `export.precision.Precision.describe`, empty in an engine of version 0.1.
    """

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
    generation: Mapping[str, float | bool] = field(default_factory=dict)
    precision: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if not _is_int(self.schema_version) or self.schema_version not in (SCHEMA_VERSION, *_OLDER):
            raise EngineFileError(
                "manifest schema_version",
                expected=" or ".join(map(str, (*_OLDER, SCHEMA_VERSION))),
                found=_shown(self.schema_version),
                remedy="Build the engine again with this version of the package: ngpt-deploy build --checkpoint ... --target ...",
            )
        if self.schema_version == SCHEMA_VERSION and not self.precision:
            raise _wrong("precision", "a table of types and formats", self.precision)
        _text("name", self.name)
        _text("created", self.created)
        for key, table in (("digests", self.digests), ("tools", self.tools), ("precision", self.precision)):
            for item, value in _mapping(key, table).items():
                _text(f"a name in {key}", item, most=_MAX_KEY)
                _text(f"{key}.{item}", value, empty=True)
        _values("flags", _mapping("flags", self.flags))
        for key, value in _mapping("generation", self.generation).items():
            _text("a name in generation", key, most=_MAX_KEY)
            if not isinstance(value, bool | int | float) or not -_MAX_SETTING <= value <= _MAX_SETTING:
                raise _wrong(f"generation.{key}", f"true, false, or a number up to {_MAX_SETTING:g}", value)
        for name in _mapping("files", self.files):
            check_name(name)
        if not isinstance(self.graph, str) or self.graph not in self.files:
            raise _wrong("graph", "a name listed under files", self.graph)
        if self.parity is not None:
            verdict = _mapping("parity", self.parity).get("verdict")
            if verdict not in ("pass", "fail"):
                raise _wrong("parity.verdict", "pass or fail", verdict)
            _values("parity", self.parity)

    @classmethod
    def from_dict(cls, data: object) -> Manifest:
        """Validates the parsed JSON. Raises EngineFileError naming the first bad key."""
        table = dict(_keys("manifest", data, cls))
        table["target"] = _build(TargetInfo, "target", table["target"], lists=("providers",))
        table["model"] = _build(ModelInfo, "model", table["model"], lists=("eos_token_ids",))
        files = _mapping("files", table["files"])
        table["files"] = {check_name(n): _build(FileEntry, f"files.{n}", e) for n, e in files.items()}
        return cls(**table)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict(to_dict(m)) == m`."""
        data = {"schema_version": self.schema_version}
        data.update((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "schema_version")
        target = asdict(self.target)
        target["providers"] = list(self.target.providers)
        model = asdict(self.model)
        model["eos_token_ids"] = list(self.model.eos_token_ids)
        tables: dict[str, Any] = {k: dict(getattr(self, k)) for k in ("digests", "tools", "flags", "generation", "precision")}
        tables["files"] = {n: asdict(e) for n, e in sorted(self.files.items())}
        parity = None if self.parity is None else dict(self.parity)
        return {**data, **tables, "target": target, "model": model, "parity": parity}


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and validates `folder`/manifest.json: strict JSON of at most 1 MiB, each key once. Raises EngineFileError."""
    path = Path(folder) / MANIFEST_NAME
    remedy = "Point at a folder that the build wrote."
    with _reading(path):
        if not path.is_file():
            found = "no such file" if not os.path.lexists(path) else "something that is no file"
            raise EngineFileError(f"{path}", expected="an engine's manifest", found=found, remedy=remedy)
        raw = read_bounded(path, MAX_MANIFEST_BYTES)
    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise EngineFileError(f"{path}", expected="JSON in UTF-8", found=str(error)[:200], remedy=remedy) from error
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


def describe_file(path: str | Path, progress: Callable[[int], None] | None = None) -> FileEntry:
    """Size and SHA-256 of a file, read in pieces; `progress` is called with the bytes of each."""
    digest, size = hashlib.sha256(), 0
    with Path(path).open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            size += len(piece)
            if progress is not None:
                progress(len(piece))
    return FileEntry(bytes=size, sha256=digest.hexdigest())


def check_name(name: object) -> str:
    """A relative POSIX path of printable characters that stays in its folder; anything else raises EngineFileError."""
    good = (
        isinstance(name, str)
        and name != ""
        and len(name) <= _MAX_TEXT
        and name.isprintable()
        and not set(name) & {"\\", ":", '"'}
    )
    if good and isinstance(name, str):
        parts = name.split("/")
        good = not PurePosixPath(name).is_absolute() and not set(parts) & {"", ".", ".."}
    if not good or not isinstance(name, str):
        raise _wrong("files", "relative names inside the engine folder", name)
    return name


def contained_path(folder: str | Path, name: str) -> Path:
    """The path of a named file of the engine; raises EngineFileError if a link leads out of the folder."""
    with _reading(Path(folder, check_name(name))):
        root = Path(folder).resolve()
        path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise EngineFileError(
            f"engine file {name!r}",
            expected=f"a file inside {root}",
            found=f"{path}",
            remedy="Replace the link with the file itself.",
        )
    return path


def verify_files(folder: str | Path, manifest: Manifest, *, digests: bool = True, progress: Progress | None = None) -> None:
    """Compares every listed file with its size and, unless `digests` is False, its SHA-256. All sizes come first: they cost
    nothing.

    Raises EngineFileError naming the first bad one.
    """
    remedy = "Copy the engine folder again, or build it again."
    paths = {name: contained_path(folder, name) for name in manifest.files}
    for name, entry in manifest.files.items():
        with _reading(paths[name]):
            size = paths[name].stat().st_size if paths[name].is_file() else None
        if size is None:
            raise EngineFileError(f"engine file {name!r}", expected="a file", found="nothing", remedy=remedy)
        if size != entry.bytes:
            raise EngineFileError(f"engine file {name!r}", expected=f"{entry.bytes} bytes", found=f"{size} bytes", remedy=remedy)
    total, done = max(1, sum(entry.bytes for entry in manifest.files.values())), 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(f"checking {name}", done / total)

    for name, entry in manifest.files.items() if digests else ():
        with _reading(paths[name]):
            found = describe_file(paths[name], read)
        if found != entry:
            raise EngineFileError(f"engine file {name!r}", expected=f"SHA-256 {entry.sha256}", found=found.sha256, remedy=remedy)


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes. Raises EngineFileError for a larger one, unread, and one that cannot be
    read; pipes and devices are not waited for."""
    with _reading(path):
        if path.exists() and not path.is_file():
            raise EngineFileError(f"{path}", expected="a file", found="something that is no file")
        with path.open("rb") as stream:
            # One byte more than may be is enough of a file that grows meanwhile; of one that is too large nothing is read.
            raw = b"" if (size := os.fstat(stream.fileno()).st_size) > limit else stream.read(limit + 1)
    if max(size, len(raw)) > limit:
        raise EngineFileError(
            f"{path}", expected=f"at most {limit} bytes", found="more", remedy="This is not a file that the build wrote."
        )
    return raw


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Trouble with the file system, loops of links included, as EngineFileError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        found = getattr(error, "strerror", None) or str(error)[:200]
        raise EngineFileError(
            f"{path}",
            expected="a file that can be read",
            found=found,
            remedy="See whether the path is right and who may read it.",
        ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {key[:_MAX_KEY]!r} twice")
        table[key] = value
    return table


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:40]}, which is not finite")
    return number


def _shown(value: object) -> str:
    try:
        return repr(value)[:200]
    except (RecursionError, ValueError):  # nested too deep, or a number of too many digits
        return f"a value of type {type(value).__name__}"


def _wrong(key: str, expected: str, found: object) -> EngineFileError:
    return EngineFileError(
        f"manifest field {key[:_MAX_KEY]!r}",
        expected=expected,
        found=_shown(found),
        remedy="Build the engine again; do not edit the manifest by hand.",
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(key: str, value: object, *, most: int = _MAX_TEXT, empty: bool = False) -> None:
    if not isinstance(value, str) or not (value or empty) or len(value) > most:
        raise _wrong(key, f"a text of {0 if empty else 1} to {most} characters", value)


def _values(key: str, value: object, depth: int = 0) -> None:
    """JSON values that are not nested without end."""
    if depth > _MAX_DEPTH:
        raise _wrong(key, f"at most {_MAX_DEPTH} levels", value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for item in inner:
        _values(key, item, depth + 1)


def _mapping(key: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(key, "a table", value)
    return value


def _keys(key: str, value: object, kind: type) -> Mapping[str, Any]:
    """The table, after its keys are held against the fields of the dataclass `kind`."""
    table = _mapping(key, value)
    allowed = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    needed |= allowed & {"schema_version"}
    if unknown := sorted(map(str, set(table) - allowed)):
        raise _wrong(f"{key}.{unknown[0]}", "no such key", table.get(unknown[0]))
    if missing := sorted(needed - set(table)):
        raise _wrong(f"{key}.{missing[0]}", "a value", None)
    return table


def _build(kind: type, key: str, value: object, lists: tuple[str, ...] = ()) -> Any:
    table = dict(_keys(key, value, kind))
    for name in lists:
        if isinstance(table[name], list):
            table[name] = tuple(table[name])
    return kind(**table)
