"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ngpt.errors import BuildError, OutputExistsError


@contextmanager
def atomic_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A working folder beside `folder` that takes its name at the end and disappears on any error."""
    parent = folder.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise BuildError(
                f"not enough room on the disk of {parent}", expected=f"about {needed / 1e6:.0f} MB",
                found=f"{free / 1e6:.0f} MB free", remedy="free some, or choose another --output",
            )  # fmt: skip
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
    except OSError as error:
        raise BuildError(
            f"cannot write to {parent}", found=error.strerror or str(error), remedy="choose another --output"
        ) from error
    try:
        yield work
        work.chmod(0o755)
        os.replace(work, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BuildError(f"the disk of {parent} is full", remedy="free some room and build again") from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputExistsError(f"{folder} appeared while the engine was being built") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
