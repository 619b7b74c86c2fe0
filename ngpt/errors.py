"""Every error this distribution raises on purpose, in one tree.

    NGPTDeployError
    ├── ConfigError                 config.json: unknown key, wrong type, contradiction, not nGPT
    ├── UnsupportedError            understood, but not offered (for example a rope type)
    ├── CheckpointError             something is wrong with a checkpoint as a whole
    │   ├── MissingTensorError
    │   ├── UnexpectedTensorError   extra or duplicate tensor
    │   ├── ShapeError
    │   ├── DtypeError
    │   ├── TensorValueError        NaN, Inf, rows that are not unit norm
    │   ├── CorruptFileError        truncated or malformed file
    │   └── UnsafeFormatError       a file format or a path that could run code or escape its folder
    ├── TargetError                 unknown or malformed target
    ├── EngineError
    ├── BuildError
    │   ├── OutputExistsError
    │   ├── ParityFailedError
    │   └── RegressionError         worse than the baseline it is held against
    ├── MissingPackageError         (also an ImportError) an optional dependency is absent
    ├── PackagingError
    └── ServerError

The serving runtime is copied into model repositories and therefore has a root of its own,
``engines.runtime.errors.ServingError``, with the same constructor.
"""

from __future__ import annotations

import errno
import re
import reprlib
import tomllib
from importlib import metadata
from pathlib import Path

MAX_TEXT = 4000  # characters of one part of an error


class NGPTDeployError(Exception):
    """An error with four parts: what went wrong, what was expected, what was found, what to do.

    ``str(error)`` reads "what: expected X, found Y. remedy"; parts that are empty are left out. Each part is `plain`:
    names and paths from outside may stand in it as they are.
    """

    def __init__(self, what: str, *, expected: str = "", found: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = plain(what)
        self.expected = plain(expected)
        self.found = plain(found)
        self.remedy = plain(remedy)

    def __str__(self) -> str:
        facts = [f"expected {self.expected}"] if self.expected else []
        facts += [f"found {self.found}"] if self.found else []
        text = self.what + (": " + ", ".join(facts) if facts else "")
        return f"{text}. {self.remedy}" if self.remedy else text


class ConfigError(NGPTDeployError):
    """``config.json`` cannot describe an nGPT model."""


class UnsupportedError(NGPTDeployError):
    """Well-formed, but deliberately not offered."""


class CheckpointError(NGPTDeployError):
    """A checkpoint cannot be used."""


class MissingTensorError(CheckpointError):
    """A tensor that the config calls for is absent."""


class UnexpectedTensorError(CheckpointError):
    """A tensor that the config does not call for, or one stored twice."""


class ShapeError(CheckpointError):
    """A tensor's shape disagrees with the config."""


class DtypeError(CheckpointError):
    """A tensor is stored in a dtype that is not a plain floating-point type."""


class TensorValueError(CheckpointError):
    """A tensor's values are impossible: NaN, Inf, or rows off the unit sphere."""


class CorruptFileError(CheckpointError):
    """A file is truncated or malformed."""


class UnsafeFormatError(CheckpointError):
    """A file format or a path that must not be trusted."""


class TargetError(NGPTDeployError):
    """Unknown or malformed build target."""


class EngineError(NGPTDeployError):
    """An engine cannot be used."""


class BuildError(NGPTDeployError):
    """An engine could not be built."""


class OutputExistsError(BuildError):
    """The output folder is already in use."""


class ParityFailedError(BuildError):
    """The engine was built, but does not agree with the PyTorch model."""


class RegressionError(BuildError):
    """The engine agrees with the PyTorch model, and is worse than a baseline says that it was."""


class MissingPackageError(NGPTDeployError, ImportError):
    """An optional package is not installed."""


class PackagingError(NGPTDeployError):
    """An engine could not be packaged as a model repository."""


class ServerError(NGPTDeployError):
    """The inference server could not be started, reached or stopped."""


def missing_package(what: str, extra: str, *, found: str = "") -> MissingPackageError:
    """The error for an absent library. Its remedy installs what the extra lists, by name: this distribution is not on PyPI."""
    wanted = _requirements(extra)
    remedy = f"pip install {' '.join(map(repr, wanted))}" if wanted else f"install what pyproject.toml lists under {extra!r}"
    return MissingPackageError(what, expected=f"the packages of the extra {extra!r}", found=found, remedy=remedy)


def _requirements(extra: str) -> list[str]:
    """What an extra lists: by pyproject.toml in a checkout, where the metadata may be older; elsewhere by the metadata."""
    try:
        source = Path(__file__).resolve().parents[1] / "pyproject.toml"
        if source.is_file():
            extras = tomllib.loads(source.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
            return [str(line) for line in extras.get(extra, ())]
        declared = metadata.requires("ngpt-deploy") or []
    except (OSError, ValueError, LookupError, metadata.PackageNotFoundError):
        return []
    return [line.split(";")[0].strip() for line in declared if re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", line)]


_OS_REMEDIES = {
    errno.ENOSPC: "free some room on that disk, or choose another folder",
    errno.EDQUOT: "free some of your quota, or choose another folder",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another file system",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "see who may read and write it, or choose another place",
    errno.EPERM: "see who may read and write it, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "see whether the path is right",
    errno.ENOTDIR: "a file stands where a folder is needed: see whether the path is right",
    errno.EISDIR: "a folder stands where a file is needed: see whether the path is right",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.ELOOP: "remove the link that leads back to itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
    errno.EPIPE: "read the output to its end, or write it to a file",
    errno.EIO: "see whether the disk is sound",
}


# Trouble with what was to be written: of a copy, Python names the file that was read.
_ON_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def os_trouble(error: OSError) -> tuple[str, str]:
    """What an OSError found, with the path it names, and what to do about it."""
    remedy = _OS_REMEDIES.get(error.errno or 0, "see whether the disk is full or damaged")
    text = error.strerror or str(error) or type(error).__name__
    named = error.filename is not None and error.errno not in _ON_WRITING
    return (f"{text}: {error.filename}" if named else text), remedy


def shown(value: object, limit: int = 80) -> str:
    """`repr` for error texts: one line of about ``limit`` characters, whatever the value and however it was nested."""
    text = _Bounded(limit).repr(value)
    return text if len(text) <= 2 * limit else text[: 2 * limit] + "..."


def plain(text: str, limit: int = MAX_TEXT) -> str:
    """The text without what a terminal would obey or refuse: control characters and lone surrogates are escaped."""
    if len(text) > limit:
        text = f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


class _Bounded(reprlib.Repr):
    """Few entries of few levels: shared lists in lists would take `repr` a time and memory exponential in the file's size."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 4
        self.maxstring = self.maxother = limit

    def repr_int(self, x: int, level: int) -> str:
        """Digits up to 128 bits; the time of turning them into text grows with their square."""
        return repr(x) if x.bit_length() <= 128 else f"a whole number of {x.bit_length()} bits"

    def repr_instance(self, x: object, level: int) -> str:
        """Short representations of plain values; of anything else its type, whose own `repr` may do anything."""
        if x is None or isinstance(x, bool | float | complex):
            return repr(x)
        if isinstance(x, bytes | bytearray):
            return self.repr_str(x[: self.maxstring].decode("latin-1"), level)
        return f"<{type(x).__name__}>"
