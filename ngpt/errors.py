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
    │   └── ParityFailedError
    ├── MissingPackageError         (also an ImportError) an optional dependency is absent
    ├── PackagingError
    └── ServerError

The serving runtime is copied into model repositories and therefore has a root of its own,
``engines.runtime.errors.ServingError``, with the same constructor.
"""

from __future__ import annotations

import errno
import re
from importlib import metadata


class NGPTDeployError(Exception):
    """An error with four parts: what went wrong, what was expected, what was found, what to do.

    ``str(error)`` reads "what: expected X, found Y. remedy"; parts that are empty are left out.
    """

    def __init__(self, what: str, *, expected: str = "", found: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.found = found
        self.remedy = remedy

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


class MissingPackageError(NGPTDeployError, ImportError):
    """An optional package is not installed."""


class PackagingError(NGPTDeployError):
    """An engine could not be packaged as a model repository."""


class ServerError(NGPTDeployError):
    """The inference server could not be started, reached or stopped."""


def missing_package(what: str, extra: str, *, found: str = "") -> MissingPackageError:
    """The error for an absent library. Its remedy installs what the extra lists, by name: this distribution is not on PyPI."""
    try:
        declared = metadata.requires("ngpt-deploy") or []
    except metadata.PackageNotFoundError:
        declared = []
    wanted = [line.split(";")[0].strip() for line in declared if re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", line)]
    remedy = f"pip install {' '.join(map(repr, wanted))}" if wanted else f"install what pyproject.toml lists under {extra!r}"
    return MissingPackageError(what, expected=f"the packages of the extra {extra!r}", found=found, remedy=remedy)


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
