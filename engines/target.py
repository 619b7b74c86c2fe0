"""Targets: what an engine is built for, one TOML file each under engines/targets."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ngpt.errors import TargetError

FOLDER = Path(__file__).parent / "targets"
DEFAULT = "cpu-int8"


@dataclass(frozen=True)
class Target:
    """A runtime, a form of the graph and a precision. `executed` says whether this project has seen it run."""

    name: str
    description: str
    runtime: Literal["onnxruntime"]
    form: Literal["ort", "portable"]
    precision: Literal["fp32", "fp16", "int8", "int4"]
    block_size: int
    cache: Literal["in-place", "growing"]
    providers: tuple[str, ...]
    executed: bool
    note: str


def target_names() -> list[str]:
    """Names of all targets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_target(name: str) -> Target:
    """Read a target by name. Raises TargetError for an unknown name or a malformed file."""
    if name not in target_names():
        raise TargetError(
            f"unknown target {name!r}", expected="one of " + ", ".join(target_names()), remedy="pass one of them as --target"
        )
    path = FOLDER / f"{name}.toml"
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"{path} is not TOML", found=str(error)) from error
    wanted = {field.name for field in fields(Target)} - {"name"}
    if set(values) != wanted:
        raise TargetError(f"{path} has the wrong keys", expected=", ".join(sorted(wanted)), found=", ".join(sorted(values)))
    values["providers"] = tuple(values["providers"])
    return Target(name=name, **values)
