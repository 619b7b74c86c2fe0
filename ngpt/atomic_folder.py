"""Folders that appear whole or not at all, and the removal of what a killed process left of one.

Beside OUTPUT lies, while it is written, a hidden working folder `.OUTPUT.<random>.ngpt-partial`:

    owner      held with flock by the process that writes; the kernel lets it go when that process ends, however it ends
    folder/    becomes OUTPUT by one rename, or is scratch that never does
    ...        scratch of whoever writes, which goes when the rest goes

A folder that is taken away goes the same way backwards.

Whoever makes a folder next in the same place removes those whose `owner` nobody holds. A process id would not do: it
may be another's by then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ngpt.errors import BuildError, NGPTDeployError, OutputExistsError, os_trouble
from ngpt.file_lock import taken

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked, and so nothing is ever swept
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".ngpt-partial"
_LOCK, _FOLDER = "owner", "folder"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def new_folder(
    output: Path, *, needed: int = 0, kind: type[NGPTDeployError] = BuildError, into_empty: bool = False
) -> Iterator[Path]:
    """A working folder beside `output` that takes its name at the end, and on any error or signal disappears.

    Args:
        output: must not exist (`into_empty`: may be an empty folder); the folders above it are made.
        needed: bytes that will be written, refused at once where the disk has fewer.
        kind: the class of errors for trouble with the disk.

    Raises:
        OutputExistsError: `output` exists, or appeared meanwhile. `kind`: any OSError, with what to do.
    """
    output = Path(output).absolute()
    check_free(output, into_empty=into_empty, kind=kind)
    made: list[Path] = []
    lock: int | None = None
    work: Path | None = None
    try:
        try:
            made = [folder for folder in output.parents if not folder.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            sweep(output.parent)
            _check_room(output.parent, needed, kind)
            work, lock = _claim(output)
            folder = work / _FOLDER
            folder.mkdir()  # its permissions follow the umask
        except (OSError, ValueError) as error:
            raise _trouble(output, error, kind) from error
        try:
            yield folder
        except BrokenPipeError:
            raise  # somebody's output, not ours
        except OSError as error:
            raise _trouble(output, error, kind) from error
        try:
            os.replace(folder, output)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise OutputExistsError(
                    f"{output} appeared while it was being made",
                    expected="a path that nobody else writes",
                    remedy="choose another --output, or remove it",
                ) from error
            raise _trouble(output, error, kind) from error
        made = []
    finally:
        if work is not None:
            _remove(work)
        if lock is not None:
            os.close(lock)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder for large files that goes at the end, beside `beside` and so on its disk: what a killed process left of one is
    swept as above. The system's folder for such things is taken where nothing can be written there."""
    lock: int | None = None
    work: Path | None = None
    try:
        with contextlib.suppress(OSError):
            sweep(beside.parent)
            work, lock = _claim(beside)
            (work / _FOLDER).mkdir()
        if work is None:
            with tempfile.TemporaryDirectory(prefix="ngpt-") as folder:
                yield Path(folder)
        else:
            yield work / _FOLDER
    finally:
        if work is not None:
            _remove(work)
        if lock is not None:
            os.close(lock)


def replace_file(path: Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8, that is there whole or as it was before. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:32]}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_free(output: Path, *, into_empty: bool = False, kind: type[NGPTDeployError] = BuildError) -> None:
    """Raise OutputExistsError if there is anything at `output`, `kind` if nothing can be there.

    `into_empty`: an empty folder is no hindrance.
    """
    try:
        mode = output.lstat().st_mode  # a link is in use, whatever it leads to
        usable = into_empty and stat.S_ISDIR(mode) and not any(output.iterdir())
    except FileNotFoundError:
        usable = output.name not in ("", "..")
    except (OSError, ValueError) as error:
        raise _trouble(output, error, kind) from error
    if not usable:
        raise OutputExistsError(
            f"{output} exists",
            expected="a new or empty folder" if into_empty else "a path that does not exist yet",
            remedy="choose another --output, or remove it",
        )


def remove_folder(folder: Path) -> None:
    """Take a folder away, whole: its name is free at once, and what a killed removal leaves is swept. Raises OSError."""
    work, lock = _claim(folder)
    try:
        folder.replace(work / _FOLDER)
    finally:
        _remove(work)
        os.close(lock)


def sweep(parent: Path) -> list[Path]:
    """Remove the working folders in `parent` whose process is dead, and return them. What is not surely ours stays."""
    swept = []
    with contextlib.suppress(OSError):
        for work in sorted(parent.glob(f".*{SUFFIX}")):
            with contextlib.suppress(OSError):
                if _abandoned(work):
                    swept.append(work)
    return swept


def _abandoned(work: Path) -> bool:
    """Whether `work` was a working folder without an owner, and is gone now."""
    if fcntl is None or work.is_symlink() or not work.is_dir() or work.lstat().st_uid != os.geteuid():
        return False
    names = {path.name for path in work.iterdir()}
    if not names:
        work.rmdir()  # killed before it took the lock; one that is about to take it will notice
        return True
    if _LOCK not in names:
        return False
    lock = os.open(work / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        # On a shared file system that does not carry locks between machines, another machine's owner would look dead.
        # Who was killed before it wrote where it runs has written nothing else either.
        told = set(os.read(lock, 1024).decode("utf-8", "replace").split())
        if not told & set(_here()) and (told or names != {_LOCK}):
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the owner lives
        _remove(work)
        return not work.exists()
    finally:
        os.close(lock)


def _here() -> tuple[str, ...]:
    """What names this machine: its host name, and its kernel since it started (the same in every container on it)."""
    try:
        return socket.gethostname(), _BOOT.read_text(encoding="utf-8").strip()
    except OSError:
        return (socket.gethostname(),)


def _claim(output: Path) -> tuple[Path, int]:
    """A new working folder beside `output` and its lock, held. A sweeper may take it between two steps: then another is made."""
    for _ in range(100):
        # Part of the name only: with the rest the working folder's could be too long where the output's is not.
        work = output.parent / f".{output.name[:32]}.{secrets.token_hex(4)}{SUFFIX}"
        lock: int | None = None
        try:
            work.mkdir(mode=0o700)
            lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            if _lock(lock):
                os.write(lock, "\n".join(_here()).encode())
                return work, lock
        except (FileExistsError, FileNotFoundError):
            pass
        except BaseException:
            if lock is not None:
                os.close(lock)
            _remove(work)
            raise
        if lock is not None:
            os.close(lock)
    raise FileExistsError(errno.EEXIST, "no free name for a working folder", str(output.parent))


def _lock(lock: int) -> bool:
    """Whether the lock is held now and its file still in place; True, too, where the file system has no locks."""
    return taken(lock) and os.fstat(lock).st_nlink > 0


def _remove(work: Path) -> None:
    """The lock goes last: what an interrupted removal leaves is still known for what it is."""
    with contextlib.suppress(OSError):
        for entry in work.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry, ignore_errors=True)
        if {entry.name for entry in work.iterdir()} <= {_LOCK}:
            (work / _LOCK).unlink(missing_ok=True)
            work.rmdir()


def _check_room(parent: Path, needed: int, kind: type[NGPTDeployError]) -> None:
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise kind(
            f"not enough room on the disk of {parent}",
            expected=f"about {needed / 1e6:.0f} MB",
            found=f"{free / 1e6:.0f} MB free",
            remedy="free some, or choose another --output",
        )


def _trouble(output: Path, error: OSError | ValueError, kind: type[NGPTDeployError]) -> NGPTDeployError:
    found, remedy = os_trouble(error) if isinstance(error, OSError) else (str(error), "choose another name")
    if SUFFIX in found:  # the working folder's own path says nothing to anybody
        found = found.split(":")[0]
    return kind(f"{output} cannot be written", found=found, remedy=remedy)
