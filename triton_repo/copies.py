"""The digests of what a model's version folder was packaged with: written by the packager, compared by the model as it starts.

Copied into model repositories, so the standard library alone. What was changed by accident is found (a tokenizer of another
model, half an upload); whoever may write the folder can write the digests too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DIGESTS = "digests.json"
_ENGINE = "engine"  # whose manifest has digests of its own
_CODE = {".py", ".so", ".pth"}
_MAX_BYTES = 16 << 20
_LOG = logging.getLogger("ngpt")


class ChangedCopyError(Exception):
    """A file of the repository is not the one that was packaged."""

    def __init__(self, path: Path, expected: str, found: str) -> None:
        super().__init__(
            f"{path} is not what was packaged: expected {expected}, found {found}. Package the engine again: ngpt-deploy package."
        )


def write_digests(version: Path, config: Mapping[str, str]) -> None:
    """Write `DIGESTS` of a version's folder: the SHA-256 of every file in it, and the parameters of its model's config.pbtxt."""
    files = {name: _sha256(version / name) for name in sorted(_names(version))}
    text = json.dumps({"files": files, "parameters": dict(config)}, indent=1) + "\n"
    (version / DIGESTS).write_text(text, encoding="utf-8")


def check_copies(version: Path, config: Mapping[str, Any]) -> None:
    """Compare a version's folder with its digests, and its parameters with those it was packaged with.

    config: the model's configuration as Triton hands it over. A changed parameter is the operator's to change: it is logged.
    Raises ChangedCopyError naming the first file that is missing, changed, or code that was not packaged.
    """
    path = version / DIGESTS
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        said = json.loads(path.read_text(encoding="utf-8"))
        files, parameters = dict(said["files"]), dict(said["parameters"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ChangedCopyError(path, "the digests of this folder", f"{type(error).__name__}: {error}"[:200]) from error
    found = set(_names(version))
    for name, digest in files.items():
        if name not in found:
            raise ChangedCopyError(version / name, "a file", "nothing")
        if (now := _sha256(version / name)) != digest:
            raise ChangedCopyError(version / name, f"SHA-256 {digest}", now)
    for name in sorted(found - files.keys()):
        if Path(name).suffix in _CODE:
            raise ChangedCopyError(version / name, "no such file", "code that was not packaged")
    now_set = {name: str(value.get("string_value", "")) for name, value in config.get("parameters", {}).items()}
    for name in sorted({*parameters, *now_set}):
        if parameters.get(name) != now_set.get(name):
            was, is_now = parameters.get(name), now_set.get(name)
            _LOG.warning("%s: the parameter %s was %r when it was packaged and is %r now", version.parent.name, name, was, is_now)


def _names(version: Path) -> Iterator[str]:
    """Files of the folder, relative, but those of the engine, of Python's caches and the digests themselves."""
    for folder, folders, files in os.walk(version):
        here = Path(folder).relative_to(version)
        folders[:] = [name for name in folders if name != "__pycache__" and (here / name).as_posix() != _ENGINE]
        yield from ((here / name).as_posix() for name in files if (here / name).as_posix() != DIGESTS)


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()
