"""Weights that a library reads while it builds, kept in an unlinked file instead of in private memory.

TensorRT holds weights by reference until the plan is built. Pages of a file are the system's to drop and read again, so an 8B
network needs a disk with room for its weights and not that much memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 4096
_SMALL = 1 << 16


class WeightsFile:
    """Keeps arrays alive, the large ones in a scratch file under `folder`, which vanishes when it is closed."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (closed by close())
        self._kept: list[NDArray[Any]] = []

    def add(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same values at an address that stays valid until close(); read-only where they went to the file."""
        if array.nbytes >= _SMALL:
            start = -(-self._file.seek(0, 2) // _ALIGNMENT) * _ALIGNMENT
            self._file.seek(start)
            array.reshape(-1).view(np.uint8).tofile(self._file)
            self._file.flush()
            raw = np.memmap(self._file, np.uint8, "r", start, (array.nbytes,))
            array = raw.view(array.dtype).reshape(array.shape)
        self._kept.append(array)
        return array

    def close(self) -> None:
        """Give everything back; addresses handed out are no longer valid."""
        self._kept.clear()
        self._file.close()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
