"""A safetensors file whose header is written first and whose tensors arrive in pieces, so that none is held whole.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON, data). The library's own writer
wants every tensor in memory at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from export.journal import Region
from ngpt.errors import BuildError

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}


class RankFile:
    """`tensors` maps names to (dtype, shape). Bytes never written are zero. A context manager.

    `kept`: a file of the same header that a killed process left is continued, its bytes as they are.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, kept: bool = False) -> None:
        self.path, self._tensors = path, dict(tensors)
        self._starts: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        # Widest first, as the library writes them: every tensor is then aligned to its own item size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            self._starts[name], position = position, end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        start = len(text).to_bytes(8, "little") + text
        same = kept and path.is_file() and _starts_with(path, start)
        self._file = path.open("r+b" if same else "wb")
        self._file.write(start)
        self._file.truncate(self._data + position)

    def write(self, name: str, at: int, rows: torch.Tensor) -> None:
        """Store `rows` [n, ...] from row `at` on. Raises BuildError if they are not of the tensor's dtype and shape."""
        dtype, shape = self._tensors[name]
        if rows.dtype != dtype or tuple(rows.shape[1:]) != shape[1:] or at + len(rows) > shape[0]:
            raise BuildError(
                f"part of {name} in {self.path.name}", expected=f"{dtype}, rows of {shape}", found=f"{rows.dtype} {rows.shape}"
            )
        self._file.seek(self.region(name, at, len(rows))[1])
        self._file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)

    def region(self, name: str, at: int, rows: int) -> Region:
        """Where so many rows from row `at` on lie in the file."""
        dtype, shape = self._tensors[name]
        row = math.prod(shape[1:]) * dtype.itemsize
        return self.path.name, self._data + self._starts[name] + at * row, rows * row

    def flush(self) -> None:
        """What was written can be read by others."""
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start
