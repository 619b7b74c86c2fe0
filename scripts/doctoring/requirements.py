"""Which versions this distribution takes: what pyproject.toml says, or the metadata of the installed one."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib import metadata

from scripts.doctoring.findings import ROOT

DISTRIBUTION = "ngpt-deploy"
_LINE = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*([^;]*)")
_CLAUSE = re.compile(r"(>=|<=|==|!=|<|>|~=)\s*([0-9][\w.]*?)(\.\*)?")
_MODULES = {
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt-rtx-cu13": "tensorrt_rtx",
    "cuda-bindings": "cuda.bindings.driver",
    "nvidia-cuda-nvrtc": "",
    "nvidia-pytriton": "pytriton",
    "tritonclient": "tritonclient.grpc",
    "protobuf": "google.protobuf",
}


@dataclass(frozen=True)
class Requirement:
    """A distribution and the versions of it that are taken, such as ">=2.9". line: as pyproject.toml has it."""

    name: str
    versions: str
    line: str

    @property
    def module(self) -> str:
        """What is imported of it; empty where it holds libraries alone."""
        return _MODULES.get(self.name, self.name.replace("-", "_"))

    def takes(self, version: str) -> bool:
        """Whether the version is one of those. Only numbers count: 2.13.0+cpu is 2.13.0, and 1.0rc1 is 1.0."""
        clauses = [match for part in self.versions.split(",") if (match := _CLAUSE.fullmatch(part.strip()))]
        return all(_holds(_numbers(version), *match.groups("")) for match in clauses)


def requirements(extra: str = "") -> list[Requirement]:
    """Of an extra; of the distribution itself without one."""
    source = ROOT / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        lines = project["optional-dependencies"].get(extra, []) if extra else project["dependencies"]
    else:
        lines = [line.split(";")[0] for line in metadata.requires(DISTRIBUTION) or [] if _of(line, extra)]
    return [Requirement(match[1], match[2].strip(), line.strip()) for line in lines if (match := _LINE.match(line))]


def python_versions() -> str:
    """Versions of Python that are taken."""
    source = ROOT / "pyproject.toml"
    if source.is_file():
        return str(tomllib.loads(source.read_text(encoding="utf-8"))["project"]["requires-python"])
    return str(metadata.metadata(DISTRIBUTION)["Requires-Python"])


def _of(line: str, extra: str) -> bool:
    found = re.search(r"""extra\s*==\s*['"]([^'"]+)['"]""", line)
    return (found[1] if found else "") == extra


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version.strip())
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _holds(version: tuple[int, ...], operator: str, text: str, wildcard: str) -> bool:
    bound = _numbers(text)
    if wildcard:
        return (version[: len(bound)] == bound) == (operator == "==")
    width = max(len(version), len(bound))
    ours, theirs = (numbers + (0,) * (width - len(numbers)) for numbers in (version, bound))
    if operator == "~=":
        return ours >= theirs and ours[: len(bound) - 1] == theirs[: len(bound) - 1]
    compared = {"<": ours < theirs, "<=": ours <= theirs, ">": ours > theirs, ">=": ours >= theirs}
    return compared.get(operator, (ours == theirs) == (operator == "=="))
