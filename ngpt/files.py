"""Files from outside: which of them a checkpoint may consist of, and JSON read as if every byte were hostile.

A checkpoint's files are regular ones in its own folder, or in the blobs of the Hugging Face cache it lies in.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

from ngpt.errors import CheckpointError, CorruptFileError, UnexpectedTensorError, UnsafeFormatError, shown

MAX_JSON_BYTES = 16 << 20
MAX_CONFIG_BYTES = 4 << 20
_LFS_POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_PAGES = (b"<!doctype html", b"<html")
_HUB_ID = re.compile(  # with what the hub's pages, its files' addresses and revisions put around it
    r"(?i:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?"
    r"(\w[\w.-]*/\w[\w.-]*)(?:@[\w.-]+(?:/.*)?)?/?(?:(?:tree|blob|resolve)/.*)?(?:[?#].*)?"
)
_CACHED_ID = re.compile(r"models--(\w[\w.]*(?:-[\w.]+)*)--(\w[\w.-]*)")


def kind_of(path: Path) -> str:
    """ "file", "folder", "nothing", or in words what else stands there. Links are followed. Raises `CheckpointError`."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing" if not path.is_symlink() else "a link to nothing"
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a NUL or lone surrogate in it, a loop of links
        raise CheckpointError(f"{path} cannot be looked at", expected="a folder or a ckpt.pt", found=_reason(error)) from error
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"


def exists(folder: Path, name: str) -> bool:
    """Whether anything at all, a broken link included, has this name in the folder."""
    try:
        return os.path.lexists(folder / name)
    except ValueError:
        return False


def contained(folder: Path, name: str) -> Path:
    """The path of a file of a checkpoint's folder, once it is known to be one and to be the checkpoint's own.

    Links may lead to places inside the folder, or into the ``blobs`` of the Hugging Face cache that holds it. Raises
    `UnsafeFormatError` for any other link, `CorruptFileError` for what is no regular file, or a git-LFS pointer or a web page
    in its place.
    """
    path = folder / name
    try:
        root, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CorruptFileError(
            f"{path} cannot be opened", expected="a file", found=_reason(error), remedy="copy or download the file again"
        ) from error
    if not real.is_relative_to(root) and real.parent not in _blobs(root):
        raise UnsafeFormatError(
            f"{path} is a link that leaves its folder",
            expected=f"a file in {folder}, or in the blobs of the Hugging Face cache that holds it",
            found=str(real),
            remedy="put the file itself there if you trust where this checkpoint comes from",
        )
    if kind_of(real) != "file":
        raise CorruptFileError(
            f"{path}", expected="a regular file", found=kind_of(real), remedy="remove it, or put the file itself there"
        )
    check_content(path)
    return path


def check_content(path: Path) -> None:
    """Refuse what a download leaves in place of a file: a git-LFS pointer, a web page. Raises `CorruptFileError`."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CorruptFileError(f"cannot read {path}", found=_reason(error)) from error
    if start.startswith(_LFS_POINTERS):
        raise CorruptFileError(
            f"{path} is a git-LFS pointer, not the file itself",
            expected="the file, which git-lfs fetches",
            found="a few lines that name it",
            remedy=f"run `git lfs install && git lfs pull` in {path.parent}",
        )
    if start.lstrip().lower().startswith(_PAGES):
        raise CorruptFileError(
            f"{path} is a web page, not the file", expected="the file", found="HTML", remedy="download the file again"
        )


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Strict JSON: bounded size, UTF-8 (a byte-order mark is passed over), no duplicate keys, no NaN, no number beyond float64.

    Raises `CheckpointError`, `CorruptFileError` above all; pipes and devices are not waited for.
    """
    if (kind := kind_of(path)) != "file":
        raise CorruptFileError(
            f"cannot read {path}", expected="a regular file", found=kind, remedy="remove it, or put the file itself there"
        )
    check_content(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise CorruptFileError(f"{path} is too large", expected=f"at most {limit} bytes", found=f"{size} bytes")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CorruptFileError(f"cannot read {path}", found=str(error)) from error


def parse_json(data: bytes, where: str) -> Any:
    """Strict JSON from bytes; ``where`` names the source in errors."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise UnexpectedTensorError(
                    f"{where} holds the key {shown(key)} twice", expected="each key once", remedy="remove the one that is wrong"
                )
            seen[key] = value
        return seen

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not a JSON number")

    def number(text: str) -> float:
        if math.isinf(value := float(text)):
            raise ValueError(f"{text[:40]} is beyond the numbers of float64")
        return value

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{where} is not valid JSON", found=str(error)[:200], remedy="correct it, or copy or download the file again"
        ) from error


def not_there(path: Path, given: str, *, what: str = "checkpoint", expected: str = "a folder or a ckpt.pt") -> CheckpointError:
    """The error for a path where nothing is; ``given`` is how the user wrote it: perhaps a model's id on the hub."""
    given = given.strip()
    hub, cached = _HUB_ID.fullmatch(given), _CACHED_ID.fullmatch(given)
    name = f"{cached[1]}/{cached[2]}" if cached is not None else hub[1] if hub is not None else ""
    # "models/mine" is a path like any other where "models" is a folder.
    if name and (name != given.rstrip("/") or not Path(name).parent.is_dir()):
        return CheckpointError(
            f"there is no {what} at {path}; {name} looks like a model's id on the Hugging Face hub",
            expected=f"{expected} on this machine",
            found="nothing",
            remedy=f"download it first: hf download {name} --local-dir {name.split('/')[1]}",
        )
    return CheckpointError(
        f"there is no {what} at {path}", expected=expected, found="nothing", remedy="see whether the path is right"
    )


def _blobs(root: Path) -> set[Path]:
    """``blobs`` beside a folder, or beside the ``snapshots`` that holds it. ``root`` is resolved: no link hides in it."""
    return {folder.parent / "blobs" for folder in (root, *root.parents) if folder == root or folder.name == "snapshots"}


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
