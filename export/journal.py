"""What of a long write is complete, so that the next process continues where a killed one stopped.

Beside the files in the making lies `journal`, one line a unit (a tensor, as a rule): its name and the SHA-256 of its bytes.
A unit counts as complete only if its bytes are read again and have this digest, so neither a torn line nor a page that never
reached the disk is taken for work that is done. What the units mean is not said here: a journal belongs to one checkpoint,
one target and one version of the code (`engines.resume` sees to that).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from ngpt.errors import BuildError

_NAME = "journal"
_CHUNK = 1 << 22
_LINE = 1 << 12  # bytes of the longest line that is read

Region = tuple[str, int, int]
"""A file's name, and the place and the number of the bytes in it."""


class Journal:
    """Of the files in the making in `folder`, which must exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, str] = {}
        self.continued = 0
        """Units that were found complete."""
        with contextlib.suppress(FileNotFoundError), (folder / _NAME).open("rb") as file:
            while line := file.readline(_LINE):
                with contextlib.suppress(ValueError, TypeError):  # torn, or damaged
                    unit, digest = json.loads(line)
                    self._digests[str(unit)] = str(digest)

    def complete(self, unit: str, regions: Iterable[Region]) -> bool:
        """Whether the unit was written, and its bytes are still those."""
        found = unit in self._digests and self._digest(regions) == self._digests[unit]
        self.continued += found
        return found

    def record(self, unit: str, regions: Iterable[Region]) -> None:
        """Note that the unit's bytes are written; files must be flushed. Raises BuildError where they are not there."""
        digest = self._digest(regions)
        if digest is None:
            raise BuildError(f"what was written of {unit} is gone", expected=f"nobody else who writes in {self.folder}")
        self._digests[unit] = digest
        # In one write, and begun on a line of its own whatever a killed process left.
        with (self.folder / _NAME).open("ab", buffering=0) as file:
            file.write(b"\n" + json.dumps([unit, digest]).encode() + b"\n")

    def hand_over(self, name: str, to: Path) -> None:
        """Give a file that is complete its place in the engine's folder.

        It keeps its name here too, where the file system has hard links: who is killed before the engine is published
        continues with it. The engine's is the only one left once this folder is removed.
        """
        try:
            os.link(self.folder / name, to)
        except OSError:
            (self.folder / name).replace(to)

    def _digest(self, regions: Iterable[Region]) -> str | None:
        """Of the bytes one after the other; None where a file is missing or too short."""
        total = hashlib.sha256()
        for name, start, length in regions:
            try:
                with (self.folder / name).open("rb") as file:
                    file.seek(start)
                    while length and (piece := file.read(min(length, _CHUNK))):
                        total.update(piece)
                        length -= len(piece)
            except FileNotFoundError:
                return None
            if length:
                return None
        return total.hexdigest()
