"""Builds that continue where a killed one stopped.

    .NAME.KEY.ngpt-resume/    beside OUTPUT/NAME: the files in the making and their journal (`export.journal`)
    .NAME.KEY.ngpt-resume.lock

KEY is that of all the engine is made of (`engines.identity`): another checkpoint, target, code or library has another, finds
nothing to continue, and removes what is void. The folder goes when the engine is published.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines.key import key_of
from export.journal import Journal
from ngpt.errors import BuildError, os_trouble
from ngpt.file_lock import locked

SUFFIX = ".ngpt-resume"
_LOCK = re.compile(rf"\.(.{{1,32}})\.[0-9a-f]{{16}}{re.escape(SUFFIX)}\.lock", re.DOTALL)


@contextmanager
def resuming(output: Path, parts: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of a build of these parts to `output`, as an earlier process left it or empty.

    At the end it is removed; an error or a signal leaves it for the next. Raises BuildError where another process builds the
    same now, or the disk refuses.
    """
    output = output.absolute()
    folder = output.with_name(f".{_short(output.name)}.{key_of(parts)[:16]}{SUFFIX}")
    lock = folder.with_name(folder.name + ".lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock) as held:
            if not held:
                raise BuildError(
                    f"{output} is being built by another process",
                    expected="one build with --resume at a time",
                    remedy="wait for it",
                )
            discard(output.parent, output.name)
            folder.mkdir(exist_ok=True)
            yield Journal(folder)
            shutil.rmtree(folder)
            lock.unlink(missing_ok=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        found, remedy = os_trouble(error)
        raise BuildError(f"{output} cannot be written", found=found, remedy=remedy) from error


def discard(parent: Path, name: str | None = None) -> None:
    """Remove what killed builds left in `parent` to be continued and nobody holds: for the output `name` (None: for any), and
    for every output that is there by now."""
    with contextlib.suppress(OSError):
        for lock in parent.glob(f".*{SUFFIX}.lock"):
            match, folder = _LOCK.fullmatch(lock.name), lock.with_suffix("")
            if match is None or lock.is_symlink() or folder.is_symlink():
                continue
            if name is not None and match[1] != _short(name) and not os.path.lexists(parent / match[1]):
                continue
            with contextlib.suppress(OSError), locked(lock) as held:
                if held:
                    shutil.rmtree(folder, ignore_errors=True)
                    if not folder.exists():
                        lock.unlink(missing_ok=True)


def _short(name: str) -> str:
    """The name as far as 32 characters; of a longer one a part and a digest."""
    return name if len(name) <= 32 else f"{name[:23]}~{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
