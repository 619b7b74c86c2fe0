"""Arrays that need not be in memory: the large ones lie in files that vanish with the check."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_IN_MEMORY = 8 << 20  # bytes of an array that is not worth a file


class Scratch:
    """`array` gives zeros; large ones are mapped from a file in `folder`, so that the system can write them out. Without a
    folder everything is in memory. Whoever made the folder removes it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._count = 0

    def array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """An array of zeros."""
        if self.folder is None or math.prod(shape) * np.dtype(dtype).itemsize < _IN_MEMORY:
            return np.zeros(shape, dtype)
        self._count += 1
        return np.memmap(self.folder / f"{self._count}.array", dtype, "w+", shape=shape)

    def kept(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array, or a copy of it in a file where it is large."""
        if self.folder is None or array.nbytes < _IN_MEMORY:
            return array
        copy = self.array(array.shape, array.dtype)
        copy[:] = array
        return copy
