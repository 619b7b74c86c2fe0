"""A folder of engines by what they are made of: who builds one that is there already takes it.

    STORE/KEY/key.json     the parts that KEY is made of (`engines.key`), and the engine's files with their digests
    STORE/KEY/engine/      the engine, whole; its files cannot be written
    STORE/.locks/KEY       held by the process that builds, checks, copies or removes the entry

An entry appears with one rename. What a killed process left is swept by the next build into the same store, whatever it
builds. What is found is read and held against its digests before it is used. That protects from damage, not from somebody
who may write in the store: trust a store as you trust those who can write there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.copying import copy_folder, make_read_only
from engines.key import differences, key_of
from engines.resume import discard
from engines.runtime.errors import EngineFileError
from engines.runtime.manifest import MANIFEST_NAME, FileEntry, Manifest, describe_file, read_manifest, verify_files
from engines.runtime.verdict import REPORT_FILES
from ngpt.atomic_folder import check_free, new_folder, remove_folder, sweep
from ngpt.errors import BuildError, CheckpointError, NGPTDeployError, OutputExistsError, os_trouble
from ngpt.file_lock import locked
from ngpt.files import read_json
from ngpt.progress import Progress, part_of, silent

KEY_FILE, ENGINE, _LOCKS = "key.json", "engine", ".locks"
_SCHEMA = 1
_KEYS = "[0-9a-f]" * 64
_LATER = {MANIFEST_NAME, *REPORT_FILES}  # which a verdict changes; the manifest vouches for the rest of them
_LOG = logging.getLogger("ngpt")


@dataclass(frozen=True)
class Entry:
    """An engine of the store. parts: what its key is made of; files: as they were built; used: when last, in seconds since
    1970."""

    folder: Path
    parts: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    used: float

    @property
    def key(self) -> str:
        """64 hex digits."""
        return self.folder.name

    @property
    def engine(self) -> Path:
        """The engine's folder."""
        return self.folder / ENGINE

    @property
    def size(self) -> int:
        """Bytes of the engine as it was built."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def label(self) -> str:
        """The engine's name and its target."""
        target = self.parts.get("target")
        return f"{self.parts.get('name')}, {target.get('name') if isinstance(target, Mapping) else target}"


class Store:
    """The store in a folder, which is made. Raises BuildError where that cannot be."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        try:
            (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            found, remedy = os_trouble(error) if isinstance(error, OSError) else (str(error), "choose another --store")
            raise BuildError(f"the store {folder} cannot be written", found=found, remedy=remedy) from error

    def obtain(
        self,
        parts: Mapping[str, Any],
        write: Callable[[Path], None],
        *,
        verify: Callable[[Path], None] | None = None,
        output: Path | None = None,
        needed: int = 0,
        progress: Progress = silent,
    ) -> Path:
        """The engine of these parts: taken where it is there, else built; one build of those that ask at once.

        Args:
            parts: of `engines.identity.components`.
            write: builds the engine into a folder that does not exist yet.
            verify: adds a verdict to an engine's folder; called for an engine that has none, found or built.
            output: where to put a copy; None for the store's own, whose files are shared by all who ask.
            needed: bytes of disk that building takes.

        Raises what `write` and `verify` raise, OutputExistsError, and BuildError for trouble with the disk.
        """
        if output is not None:
            check_free(output)
        key = key_of(parts)
        with self._trouble(), self.holding(key):
            entry = self._sound(key, part_of(progress, 0.0, 0.3))
            if entry is None:
                self._tell_what_differs(parts)
                with contextlib.suppress(OutputExistsError):  # without locks two may have built it: the first one's counts
                    with new_folder(self.folder / key, needed=needed) as work:
                        write(work / ENGINE)
                        _describe(work, parts)
                    _LOG.info("built and stored as %s", key)
                entry = self.read(key)
            else:
                sweep(entry.folder)  # scratch of a verification that was killed
                _LOG.info("found in the store: %s (%s)", key, entry.label)
            if verify is not None and _unverified(entry.engine):
                verify(entry.engine)
            os.utime(entry.folder / KEY_FILE)
            if output is None:
                return entry.engine
            with new_folder(output, needed=entry.size) as work:
                copy_folder(entry.engine, work)
            return output

    def read(self, key: str) -> Entry:
        """The entry, its contents unread. Raises NGPTDeployError or ServingError where it is absent or damaged."""
        file = self.folder / key / KEY_FILE
        try:
            data = read_json(file)
            parts, files = data["parts"], {str(name): FileEntry(**entry) for name, entry in data["files"].items()}
            if data["schema"] != _SCHEMA or not isinstance(parts, dict) or key_of(parts) != key:
                raise ValueError("not what the key is made of")
            return Entry(file.parent, parts, files, file.stat().st_mtime)
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            raise BuildError(f"{file}", expected="what this store wrote", found=f"{type(error).__name__}: {error}") from error

    def entries(self) -> list[Entry]:
        """All that can be read, the one that was used last first."""
        found = []
        for key in self.all_keys():
            with contextlib.suppress(NGPTDeployError, EngineFileError):
                found.append(self.read(key))
        return sorted(found, key=lambda entry: -entry.used)

    def all_keys(self) -> list[str]:
        """Of all entries, readable or not."""
        return sorted(folder.name for folder in self.folder.glob(_KEYS))

    def check(self, entry: Entry, progress: Progress = silent) -> Manifest | None:
        """Hold every file of an entry against its digest; returns the manifest, None where there is none yet.

        Raises EngineFileError, or BuildError, naming the first file that is not as it was.
        """
        if not (entry.engine / MANIFEST_NAME).is_file():
            _check_files(entry.engine, entry.files)
            return None
        manifest = read_manifest(entry.engine)
        told = {"weights": entry.parts.get("weights"), "spec": entry.parts.get("spec"), "code": entry.parts.get("code")}
        named = {name: entry for name, entry in manifest.files.items() if name not in _LATER}
        if named != dict(entry.files) or {key: manifest.digests.get(key) for key in told} != told:
            raise BuildError(f"the manifest of {entry.engine}", expected="the files and digests of key.json", found="others")
        verify_files(entry.engine, manifest, progress=progress)
        return manifest

    @contextmanager
    def holding(self, key: str) -> Iterator[None]:
        """The entry's lock; who has it is waited for."""

        def waiting(holder: str) -> None:
            _LOG.info("waiting for %s, which works on the same engine of the store", holder)

        with locked(self.folder / _LOCKS / key, waiting=waiting):
            yield

    def nearest(self, parts: Mapping[str, Any]) -> tuple[Entry, list[str]] | None:
        """The entry that differs from these parts in the fewest values, and in which."""
        compared = [(entry, differences(parts, entry.parts)) for entry in self.entries()]
        return min(compared, key=lambda pair: len(pair[1]), default=None)

    def prune(self, *, keep_bytes: int | None = None, older_than: float | None = None) -> list[Entry]:
        """Remove what was not used for `older_than` seconds, then what was used least recently until the rest fits
        `keep_bytes`; and what cannot be read, and what killed processes left. What somebody holds stays. Returns what was
        removed of what can be read."""
        gone, kept, now = [], 0, time.time()
        with self._trouble():
            for key in self.all_keys():
                try:
                    self.read(key)
                except (NGPTDeployError, EngineFileError):
                    self._remove(key)
            for entry in self.entries():
                old = older_than is not None and now - entry.used > older_than
                large = keep_bytes is not None and kept + entry.size > keep_bytes
                if (old or large) and self._remove(entry.key):
                    gone.append(entry)
                else:
                    kept += entry.size
            sweep(self.folder)
            discard(self.folder)
        return gone

    def _remove(self, key: str) -> bool:
        lock = self.folder / _LOCKS / key
        with locked(lock) as held:
            if held:
                remove_folder(self.folder / key)
                lock.unlink(missing_ok=True)
            return held

    def _sound(self, key: str, progress: Progress) -> Entry | None:
        """The entry, its files checked; None where it is absent, or was damaged and is removed."""
        if not (self.folder / key).exists():
            return None
        try:
            entry = self.read(key)
            self.check(entry, progress)
            return entry
        except (EngineFileError, BuildError, CheckpointError) as error:
            _LOG.warning("the engine %s of the store is damaged and is built again: %s", key, error)
            remove_folder(self.folder / key)
            return None

    def _tell_what_differs(self, parts: Mapping[str, Any]) -> None:
        found = self.nearest(parts)
        if found is not None:
            entry, lines = found
            _LOG.info("not in the store; the nearest there (%s) differs in %s", entry.label, "; ".join(lines[:4]))

    @contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise  # somebody's output, not ours
        except OSError as error:
            found, remedy = os_trouble(error)
            raise BuildError(f"the store {self.folder}", found=found, remedy=remedy) from error


def explain(store: Path, parts: Mapping[str, Any]) -> list[str]:
    """What a build with this store would do, in lines; nothing is made."""
    key = key_of(parts)
    if not store.is_dir():
        return [f"key      {key}", f"store    {store} is not there yet: the engine would be built"]
    opened = Store(store)
    if (store / key).exists():
        return [f"key      {key}", f"store    found: {opened.folder / key / ENGINE}"]
    found = opened.nearest(parts)
    if found is None:
        return [f"key      {key}", "store    empty: the engine would be built"]
    entry, lines = found
    where = f"store    not found; the nearest is {entry.key} ({entry.label}), which differs in"
    return [f"key      {key}", where, *(f"         {line}" for line in lines)]


def _describe(work: Path, parts: Mapping[str, Any]) -> None:
    """Write key.json beside the engine, whose files are read once and cannot be written any more."""
    engine = work / ENGINE
    manifest = read_manifest(engine).files if (engine / MANIFEST_NAME).is_file() else {}
    files = {}
    for path in sorted(engine.rglob("*")):
        name = path.relative_to(engine).as_posix()
        if path.is_file() and name not in _LATER:
            files[name] = asdict(manifest[name] if name in manifest else describe_file(path))
    make_read_only(engine)
    text = json.dumps({"schema": _SCHEMA, "parts": parts, "files": files}, indent=2, ensure_ascii=False) + "\n"
    (work / KEY_FILE).write_text(text, encoding="utf-8")


def _unverified(engine: Path) -> bool:
    return (engine / MANIFEST_NAME).is_file() and read_manifest(engine).parity is None


def _check_files(engine: Path, files: Mapping[str, FileEntry]) -> None:
    for name, entry in files.items():
        path = engine / name
        found = describe_file(path) if path.is_file() and path.stat().st_size == entry.bytes else None
        if found != entry:
            raise BuildError(f"{path}", expected=f"{entry.bytes} bytes with SHA-256 {entry.sha256}", found="others")
