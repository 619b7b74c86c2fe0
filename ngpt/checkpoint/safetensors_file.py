"""A safetensors header reader written as if every byte were hostile, and a lazy reader on top of it.

The header is parsed here, and not only by the safetensors library, so that a truncated file, a tensor stored
twice or an exotic dtype is named instead of surfacing as the library's generic error. Nothing is read beyond the
header until a tensor is asked for.
"""

from __future__ import annotations

import contextlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ngpt.errors import CorruptFileError, shown
from ngpt.files import parse_json

# The format allows 100 MB of header, which is gigabytes of Python objects; the table's largest network needs 8 MB.
MAX_HEADER_BYTES = 16 << 20
_MAX_AXES = 64
_NAMES_OF_WIDTH = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
_BITS = {name: bits for bits, names in _NAMES_OF_WIDTH.items() for name in names.split()}


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: safetensors dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 0) // 8


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name to `TensorInfo` from a safetensors file's header, checked against the file's real size.

    Raises `CorruptFileError` (truncated, overlapping, malformed) or `UnexpectedTensorError` (a name twice).
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = _header_length(file.read(8), size, path)
            header = parse_json(file.read(length), f"the header of {path}")
    except OSError as error:
        raise CorruptFileError(f"cannot read {path}", found=str(error)) from error
    if not isinstance(header, dict):
        raise CorruptFileError(f"the header of {path}", expected="a JSON object", found=type(header).__name__)
    header.pop("__metadata__", None)
    infos, spans = {}, []
    for name, entry in header.items():
        infos[name], span = _entry(name, entry, path)
        spans.append((span, name))
    _check_spans(sorted(spans), size - 8 - length, path)
    return infos


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    if len(prefix) < 8:
        raise CorruptFileError(f"{path} is truncated", expected="at least 8 bytes", found=f"{size} bytes")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise CorruptFileError(
            f"{path} is not a safetensors file",
            expected=f"a header of at most {MAX_HEADER_BYTES} bytes",
            found=f"{length} bytes" + (f": the file starts with {shown(text)}" if (text := _text(prefix)) else ""),
            remedy="copy or download the file again",
        )
    if 8 + length > size:
        raise CorruptFileError(
            f"{path} is truncated in its header",
            expected=f"at least {8 + length} bytes",
            found=f"{size} bytes",
            remedy="copy or download the file again",
        )
    return length


def _text(prefix: bytes) -> str:
    """The first bytes, if they are text: a server's complaint, for example, saved under the file's name."""
    text = prefix.decode("latin-1")
    return text if text.isascii() and text.isprintable() else ""


def _entry(name: str, entry: Any, path: Path) -> tuple[TensorInfo, tuple[int, int]]:
    def bad(found: str) -> CorruptFileError:
        return CorruptFileError(f"tensor {shown(name)} in {path} is described badly", found=found)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad(shown(entry))
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise bad(f"dtype {shown(dtype)}")
    lists = isinstance(shape, list) and len(shape) <= _MAX_AXES and isinstance(span, list) and len(span) == 2
    numbers = [*shape, *span] if lists else [None]
    if any(not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < 1 << 63 for n in numbers):
        raise bad(f"shape {shown(shape)}, data_offsets {shown(span)}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or span[1] - span[0] != bits // 8:
        raise bad(f"{span[1] - span[0]} bytes for {dtype} {shown(shape)}")
    return TensorInfo(dtype, tuple(shape)), (span[0], span[1])


def _check_spans(spans: list[tuple[tuple[int, int], str]], available: int, path: Path) -> None:
    """The format demands that tensors tile the data exactly: no overlap, no hole, nothing after the last."""
    position = 0
    for (begin, end), name in spans:
        if begin != position:
            raise CorruptFileError(
                f"tensor {shown(name)} in {path} overlaps another or leaves a hole",
                expected=f"data starting at byte {position}",
                found=f"byte {begin}",
            )
        position = end
    if position > available:
        cut = next(name for (_, end), name in spans if end > available)
        raise CorruptFileError(
            f"{path} is truncated: tensor {shown(cut)} and what follows it is incomplete",
            expected=f"{position} bytes of tensor data",
            found=f"{available}",
            remedy="copy or download the file again",
        )
    if position < available:
        raise CorruptFileError(f"{path} has bytes that belong to no tensor", expected=f"{position} bytes", found=f"{available}")


class SafetensorsReader:
    """Lazy, memory-mapped tensors of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.infos = read_header(path)
        self._stack = contextlib.ExitStack()
        self._file: Any = None

    def get(self, name: str) -> torch.Tensor:
        """The tensor in its storage dtype, on the CPU."""
        try:
            if self._file is None:
                self._file = self._stack.enter_context(safe_open(self.path, framework="pt", device="cpu"))
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"cannot map {self.path}", found=str(error)) from error
        return tensor

    def close(self) -> None:
        """Drop the mapping."""
        self._stack.close()
        self._file = None
