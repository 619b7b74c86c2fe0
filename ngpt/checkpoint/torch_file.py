"""`load_torch_file`: what `torch.save` wrote, read with ``weights_only=True`` after everything about it has been bounded.

Tensors stay in the file (they are mapped). Objects of classes beside them become inert stand-ins: nothing is imported or run.
"""

from __future__ import annotations

import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ngpt.checkpoint.pickle_scan import StandIns, scan_pickle
from ngpt.errors import CheckpointError, CorruptFileError, NGPTDeployError, UnsafeFormatError, shown

MAX_PICKLE_BYTES = 16 << 20  # the structure only; tensor bytes are separate members of the archive
_MAX_DIRECTORY_BYTES = 4 << 20  # some 60 bytes a member, a member a tensor
_PICKLE = "data.pkl"
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"


def load_torch_file(path: Path) -> Mapping[str, Any]:
    """The dict in a file of `torch.save`; tensors are mapped, and other objects are stand-ins with nothing in them.

    Raises `UnsafeFormatError` naming an object that is refused, `CorruptFileError`, `CheckpointError` when it is no dict.
    """
    try:
        with path.open("rb") as file:
            _check_end(file, path)
            with zipfile.ZipFile(file) as archive:
                root, members = _members(archive, path)
                data = archive.read(f"{root}/{_PICKLE}")
        found = scan_pickle(data, members, str(path))
        with torch.serialization.safe_globals(_stand_ins(found)):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except NGPTDeployError:
        raise
    except Exception as error:  # zipfile and torch raise whatever a damaged file leads them to
        raise CorruptFileError(
            f"{path} cannot be read", found=f"{type(error).__name__}: {_reason(error)}", remedy="copy or download the file again"
        ) from error
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{path}", expected="a dict", found=type(stored).__name__)
    return stored


def _reason(error: Exception) -> str:
    """The first line that says something: torch's advice on how to be less careful is no reason."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0].split(" Please use")[0]
    return "torch refuses it" if text.startswith("Weights only load failed") else text[:160]


class _StandIn:
    """An object that takes anything and keeps nothing."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


class _DictStandIn(_StandIn):
    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()  # the one dict that torch lets have a state


class _ListStandIn(_StandIn):
    def __new__(cls, *_: object, **__: object) -> Any:
        return []


class _DtypeStandIn(_StandIn):
    """NumPy's dtype, of which the code is kept: "f8"."""

    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code


class _NumberStandIn(_StandIn):
    """A number of NumPy's, as Python's own: trainings compute sizes and scales with NumPy, too."""

    def __new__(cls, dtype: object = None, raw: object = None, *_: object) -> Any:
        form = _NUMBERS.get(dtype.code) if isinstance(dtype, _DtypeStandIn) and isinstance(dtype.code, str) else None
        if form is not None and isinstance(raw, bytes) and len(raw) == struct.calcsize(form):
            return struct.unpack(form, raw)[0]
        return super().__new__(cls)


_NUMBERS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "i2": "<h", "i1": "<b", "b1": "<?"}
_NUMBERS |= {f"u{form[-1]}": _NUMBERS[form].upper() for form in ("i8", "i4", "i2", "i1")}
_KEPT = {"numpy.dtype": _DtypeStandIn} | {f"numpy.{core}.multiarray.scalar": _NumberStandIn for core in ("core", "_core")}


def _stand_ins(found: StandIns) -> list[Any]:
    """(class, full name) for `torch.serialization.safe_globals`, each class named as what it stands for."""

    def kind(name: str) -> type:
        if name in found.mappings:
            return _DictStandIn
        return _ListStandIn if name in found.sequences else _KEPT.get(name, _StandIn)

    return [(type(name, (kind(name),), {}), name) for name in sorted(found.plain)]


def _check_end(file: BinaryIO, path: Path) -> None:
    """The archive's end, before a parser follows what it says: no other may be found by one that looks elsewhere."""
    magic = file.read(2)
    size = file.seek(0, 2)
    if magic != b"PK":
        raise _not_an_archive(path, magic)
    file.seek(max(0, size - 42))
    tail = file.read(42)
    end = tail[-22:]
    if len(tail) < 22 or not end.startswith(_END) or end[20:] != b"\0\0":
        raise CorruptFileError(
            f"{path} is truncated", expected="a complete zip archive", remedy="copy or download the file again"
        )
    length, offset = struct.unpack("<II", end[12:20])
    trailer = 22
    if tail.startswith(_LOCATOR64):
        file.seek(min(struct.unpack("<Q", tail[8:16])[0], size))
        record = file.read(56)
        if len(record) < 56 or not record.startswith(_END64):
            raise CorruptFileError(f"{path}", expected="a zip64 record where its locator points")
        narrow, (length, offset), trailer = (length, offset), struct.unpack("<QQ", record[40:56]), 98
        if any(short not in (0xFFFFFFFF, long) for short, long in zip(narrow, (length, offset), strict=True)):
            raise CorruptFileError(f"{path}", expected="one place for the archive's list of members", found="two")
    if offset + length + trailer != size:
        raise CorruptFileError(
            f"{path}: the archive's list of members", expected=f"at byte {size - trailer - length}", found=f"at byte {offset}"
        )
    if length > _MAX_DIRECTORY_BYTES:
        raise UnsafeFormatError(
            f"{path}: the archive's list of members", expected=f"at most {_MAX_DIRECTORY_BYTES} bytes", found=f"{length}"
        )
    file.seek(0)


def _not_an_archive(path: Path, magic: bytes) -> CheckpointError:
    if magic in (b"", b"P"):
        return CorruptFileError(
            f"{path} is truncated",
            expected="a complete zip archive",
            remedy="copy or download the file again",
        )
    return UnsafeFormatError(
        f"{path} is not an archive as torch.save writes it; a bare pickle can run code when loaded",
        expected="a zip archive",
        found=f"a file that starts with {magic!r}",
        remedy="re-save it where you trust it, with PyTorch 1.6 or later",
    )


def _members(archive: zipfile.ZipFile, path: Path) -> tuple[str, dict[str, int]]:
    """(the one folder in the archive, its members' sizes by their names in it). Torch stores members uncompressed, each once.

    Anything else could expand without bound, or be read as one thing here and as another by torch.
    """
    sizes: dict[str, int] = {}
    roots = set()
    for member in archive.infolist():
        name = shown(member.filename)
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise UnsafeFormatError(f"{path}: member {name} is compressed", expected="stored members")
        root, _, inner = member.filename.partition("/")
        if inner in sizes:
            raise UnsafeFormatError(f"{path}: member {name} is there twice", expected="each member once")
        if not inner.startswith("data/") and member.file_size > MAX_PICKLE_BYTES:
            raise UnsafeFormatError(
                f"{path}: member {name}", expected=f"at most {MAX_PICKLE_BYTES} bytes", found=f"{member.file_size}"
            )
        roots.add(root)
        sizes[inner] = member.file_size
    if "constants.pkl" in sizes:
        raise UnsafeFormatError(
            f"{path} is a TorchScript program, which is code",
            expected="a checkpoint of the training script",
            found="constants.pkl",
        )
    if len(roots) != 1 or _PICKLE not in sizes:
        raise CorruptFileError(f"{path} is not an archive as torch.save writes it", expected=f"one folder with a {_PICKLE}")
    return roots.pop(), sizes
