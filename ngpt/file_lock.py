"""Locks between processes: files that the kernel unlocks when their holder ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked
    fcntl = None  # type: ignore[assignment]

_PAUSE = 0.1  # seconds between two looks at a lock


@contextmanager
def locked(path: Path, *, waiting: Callable[[str], None] | None = None) -> Iterator[bool]:
    """Hold the lock file `path`, which is made and stays; yields whether it is held.

    Where another process holds it, that one is waited for; `waiting` is called once, with what is known of it. Without
    `waiting` nothing is waited for, and False is yielded. True, too, where the file system has no locks. Raises OSError
    where the file cannot be made.
    """
    lock, told = -1, False
    try:
        while True:
            if lock < 0:
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if taken(lock):
                if os.fstat(lock).st_nlink:
                    break
                os.close(lock)  # whoever held it has removed it: the one that is there now is meant
                lock = -1
                continue
            if waiting is None:
                yield False
                return
            if not told:
                waiting(_holder(lock))
                told = True
            time.sleep(_PAUSE)
        with contextlib.suppress(OSError):
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield True
    finally:
        if lock >= 0:
            os.close(lock)


def taken(lock: int) -> bool:
    """Whether the lock is held now; True, too, where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holder(lock: int) -> str:
    with contextlib.suppress(OSError, ValueError):
        if number := int(os.pread(lock, 32, 0)):
            return f"process {number}"
    return "another process"
