"""What an engine is made of, part by part. Two builds of the same parts make the same engine, but for its time of making.

A part that changes nothing in one build or another is still a part of the key (`engines.key`): an engine that is built again
costs minutes, one that is taken for another costs trust.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engines.backends import Backend, Job, backend_of
from engines.device import detect
from engines.key import canonical
from engines.record import code_digest
from engines.runtime.manifest import describe_file
from engines.target import Target

_ROOT = Path(__file__).parent
# `code_digest` covers what computes and writes the network. These decide on sizes, describe the result, or judge it.
_AROUND = ("*.py", "runtime/*.py", "parity/*.py", "parity/templates/*")
_LIBRARIES = (
    "ngpt-deploy",
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "ml-dtypes",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "protobuf",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "tensorrt-llm",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)
_PROGRAMS = ("trtllm-build",)


def components(job: Job, name: str, tools: Mapping[str, str]) -> dict[str, Any]:
    """The parts, as JSON values. Reads the checkpoint's weights once, for their digest.

    Args:
        job: the checkpoint, opened; the target, resolved; how it is divided.
        name: of the engine.
        tools: what the backend says of the packages that write it.
    """
    checkpoint, target = job.checkpoint, job.target
    return {
        "weights": checkpoint.digest(),
        "spec": checkpoint.spec.digest(),
        "checkpoint": {"notes": list(checkpoint.notes), "off_sphere": checkpoint.off_sphere},
        "text": {file: describe_file(path).sha256 for file, path in sorted(checkpoint.text.files.items())},
        "ends": {"ids": list(checkpoint.text.ends), "given": checkpoint.text.ends_given},
        "target": _described(target),
        "parallel": {"tp": job.parallel.tp, "pp": job.parallel.pp},
        "name": name,
        "code": code_digest(),
        "code around it": _digest_of_files(path for pattern in _AROUND for path in _ROOT.glob(pattern)),
        "backend": _from_outside(backend_of(target.runtime)),
        "tools": dict(tools),
        "libraries": _libraries(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": f"{platform.system()} {platform.machine()}",
        "device": _device() if target.gpu is not None else None,
        "compilers": _compilers(target),
    }


def _described(target: Target) -> dict[str, Any]:
    """All fields, with the precision's types and formats in the place of its name alone."""
    fields = {field.name: getattr(target, field.name) for field in dataclasses.fields(target) if field.name != "precision"}
    fields |= {key: dataclasses.asdict(fields[key]) for key in ("gpu", "profile") if fields[key] is not None}
    precision = {field.name: str(getattr(target.precision, field.name)) for field in dataclasses.fields(target.precision)}
    described: dict[str, Any] = json.loads(canonical(fields | {"precision": precision}))
    return described


def _libraries() -> dict[str, str]:
    found = {}
    for package in _LIBRARIES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _device() -> dict[str, str] | None:
    """The card that a builder may look at or measure on."""
    device = detect()
    return None if device is None else {"name": device.name, "compute_capability": device.compute_capability}


def _compilers(target: Target) -> dict[str, str]:
    """What compiles this project's kernels, and what builds from what is converted here, where that is another program."""
    found = {}
    if target.form == "plugins":
        from export.plugins.compile import compiler

        found["kernels"] = compiler()
    if target.runtime == "tensorrt_llm":
        for program in _PROGRAMS:
            path = shutil.which(program)
            found[program] = "none" if path is None else describe_file(path).sha256
    return found


def _from_outside(backend: Backend) -> dict[str, str] | None:
    """The class of a backend that was registered from outside, and its file's digest; None for those that are here."""
    kind = type(backend)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is not None and Path(file).is_relative_to(_ROOT):
        return None
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "file": "" if file is None else describe_file(file).sha256}


def _digest_of_files(paths: Iterator[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            data = path.read_bytes()
            total.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + len(data).to_bytes(8, "little") + data)
    return total.hexdigest()
