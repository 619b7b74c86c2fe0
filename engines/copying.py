"""Copies of an engine's folder that share its blocks where the file system can, and never its files.

A hard link would be free everywhere, but an edit through one name would change the file under the other: an engine that
somebody alters in place would damage the store that it came from. A reflink (Btrfs, XFS, bcachefs) is as cheap and is a
file of its own; elsewhere the bytes are copied.
"""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_FICLONE = 0x40049409  # ioctl of Linux: linux/fs.h
_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_EXECUTE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files and folders in `source` into the existing folder `target`. The copies can be written, as the umask has
    it, and run where the originals can."""
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(exist_ok=True)
            continue
        if not _cloned(path, copy):
            shutil.copyfile(path, copy)
        if path.stat().st_mode & _EXECUTE:
            readers = (copy.stat().st_mode & 0o444) >> 2
            copy.chmod(stat.S_IMODE(copy.stat().st_mode) | readers)


def make_read_only(folder: Path) -> None:
    """Take the right to write from all files in a folder; folders stay as they are, so that it can be removed."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_WRITE)


def _cloned(source: Path, copy: Path) -> bool:
    """Whether the copy shares the original's blocks; on False an empty file may lie there."""
    if fcntl is None:
        return False
    with source.open("rb") as read, copy.open("wb") as write:
        try:
            fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())
        except OSError:
            return False
    return True
