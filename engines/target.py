"""Targets: what an engine is built for, one TOML file each under engines/targets."""

import dataclasses
import math
import re
import tomllib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ngpt.errors import TargetError

FOLDER = Path(__file__).parent / "targets"
DEFAULT = "cpu-int8"
AUTO = "auto"
_FP8_CAPABILITY = (8, 9)  # the first with float8 conversions: Ada
_MAX_BYTES = 1 << 16  # of a target's file
_MAX_NOTE = 1000  # characters of a text in it


class TargetWarning(UserWarning):
    """A target's file cannot be used, and was skipped."""


@dataclass(frozen=True)
class Gpu:
    """A card: compute capability such as "9.0" ("": any that the library supports), memory in 10**9 bytes, memory bandwidth in
    10**9 bytes per second."""

    compute_capability: str
    memory_gb: float
    bandwidth_gb_per_s: float

    def __post_init__(self) -> None:
        capability = self.compute_capability
        good = isinstance(capability, str) and re.fullmatch(r"([0-9]{1,3}\.[0-9]{1,2})?", capability)
        _require("gpu.compute_capability", bool(good), 'a text such as "9.0", or ""', capability)
        for key in ("memory_gb", "bandwidth_gb_per_s"):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(f"gpu.{key}", number and math.isfinite(value) and 0 < value < 1e9, "a number above 0", value)


@dataclass(frozen=True)
class Profile:
    """What a plan is optimised for: the longest piece of a prompt read at once (TensorRT-LLM: the most tokens of a step), and the
    most sequences decoded at once."""

    prefill_tokens: int
    decode_batch: int

    def __post_init__(self) -> None:
        for key in ("prefill_tokens", "decode_batch"):
            _require(f"profile.{key}", _whole(getattr(self, key), 1), "a whole number of at least 1", getattr(self, key))


@dataclass(frozen=True)
class Target:
    """A runtime, a form of the network and a precision. `executed` says whether this project has seen it run.

    `gpu` and `profile` are there for TensorRT and TensorRT-LLM targets and for them alone. Form "ort" is ONNX with ONNX Runtime's kernels,
    "portable" standard ONNX, "native" a TensorRT network of its own layers, "plugins" one with this project's kernels. `kv_cache` is the
    type of cached keys and values: "auto" that of the arithmetic.
    """

    name: str
    description: str
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_llm"]
    form: Literal["ort", "portable", "native", "plugins"]
    precision: Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
    block_size: int
    cache: Literal["in-place", "growing", "paged"]
    providers: tuple[str, ...]
    executed: bool
    note: str
    precisions: tuple[str, ...] = ()
    gpu: Gpu | None = None
    profile: Profile | None = None
    kv_cache: Literal["auto", "fp8"] = "auto"

    def __post_init__(self) -> None:
        for key, kind in get_type_hints(Target).items():
            if choices := get_args(kind) if getattr(kind, "__origin__", None) is Literal else ():
                _require(key, getattr(self, key) in choices, "one of " + ", ".join(choices), getattr(self, key))
        for key in ("name", "description", "note"):
            value = getattr(self, key)
            _require(key, isinstance(value, str) and len(value) <= _MAX_NOTE, f"a text of at most {_MAX_NOTE} characters", value)
        _require("executed", isinstance(self.executed, bool), "true or false", self.executed)
        _require("block_size", _whole(self.block_size, 0), "a whole number of at least 0", self.block_size)
        texts = isinstance(self.providers, tuple) and all(isinstance(item, str) for item in self.providers)
        _require("providers", texts, "a list of texts", self.providers)
        known = get_args(get_type_hints(Target)["precision"])
        offered = isinstance(self.precisions, tuple) and all(item in known for item in self.precisions)
        _require("precisions", offered, "a list of some of " + ", ".join(known), self.precisions)
        _require("gpu", self.gpu is None or isinstance(self.gpu, Gpu), "a table", self.gpu)
        _require("profile", self.profile is None or isinstance(self.profile, Profile), "a table", self.profile)
        on_gpu = self.runtime != "onnxruntime"
        for key in ("gpu", "profile"):
            _require(
                key,
                (getattr(self, key) is not None) == on_gpu,
                "a table for the TensorRT runtimes, and for them alone",
                getattr(self, key),
            )
        _require("providers", on_gpu or bool(self.providers), "at least one for onnxruntime", self.providers)

    @property
    def on_onnx(self) -> bool:
        """Whether the engine is an ONNX graph."""
        return self.runtime == "onnxruntime"


def target_names() -> list[str]:
    """Names of all targets, sorted; whether their files can be used is seen when they are loaded."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_targets() -> list[Target]:
    """All targets, by name. A file that cannot be used is skipped with a TargetWarning that names it."""
    found = []
    for name in target_names():
        try:
            found.append(load_target(name))
        except TargetError as error:
            warnings.warn(f"a target is skipped: {error}", TargetWarning, stacklevel=2)
    return found


def load_target(name: str, precision: str | None = None) -> Target:
    """Read a target by name, in its own precision or another that it offers.

    Raises TargetError for an unknown name, a precision the target does not offer, or a malformed file.
    """
    if name not in target_names():
        raise TargetError(
            f"unknown target {name[:200]!r}", expected="one of " + ", ".join(target_names()),
            remedy="pass one of them as --target",
        )  # fmt: skip
    path = FOLDER / f"{name}.toml"
    try:
        target = _read(name, path)
    except TargetError as error:
        remedy = f"correct {path}, or remove it"
        raise TargetError(f"{path.name}: {error.what}", expected=error.expected, found=error.found, remedy=remedy) from error
    if precision is None or precision == target.precision:
        return target
    if precision not in target.precisions:
        raise TargetError(
            f"precision of the target {name}", expected=", ".join(target.precisions or (target.precision,)), found=precision[:200],
            remedy="choose another --precision or --target",
        )  # fmt: skip
    return dataclasses.replace(target, precision=precision)  # type: ignore[arg-type]


def _read(name: str, path: Path) -> Target:
    """The target in a file. Raises TargetError without the file's name or a remedy."""
    try:
        if not path.is_file():
            raise TargetError("not a file that can be read")
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise TargetError("too large for a target", expected=f"at most {_MAX_BYTES} bytes")
        values: dict[str, Any] = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise TargetError("cannot be read", found=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of too many digits
        raise TargetError("not TOML", found=str(error)[:200]) from error
    _keys("the target", values, Target, but=("name",))
    for key, kind in (("gpu", Gpu), ("profile", Profile)):
        if key in values:
            _require(key, isinstance(values[key], dict), "a table", values[key])
            _keys(key, values[key], kind)
            values[key] = kind(**values[key])
    for key in ("providers", "precisions"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    return Target(name=name, **values)


def _keys(what: str, table: Iterable[str], kind: Any, but: tuple[str, ...] = ()) -> None:
    """Hold the keys of a table against the fields of the dataclass `kind`."""
    known = {field.name: field.default is dataclasses.MISSING for field in fields(kind) if field.name not in but}
    needed = {key for key, required in known.items() if required}
    if missing := sorted(needed - set(table)):
        raise TargetError(f"{what} lacks keys", expected=", ".join(sorted(needed)), found=f"no {', '.join(missing)}")
    if unknown := sorted(set(table) - set(known)):
        raise TargetError(f"{what} has unknown keys", expected=", ".join(sorted(known)), found=", ".join(unknown)[:200])


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 31


def _require(key: str, holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise TargetError(key, expected=expected, found=repr(found)[:200])


def with_kv_cache(target: Target, kv_cache: str) -> Target:
    """The target with keys and values cached as `kv_cache`: "auto" (the arithmetic's own type) or "fp8" (float8_e4m3).

    Raises TargetError where "fp8" has no meaning: a runtime other than TensorRT-LLM, a card without float8, or fp32.
    """
    if kv_cache == target.kv_cache:
        return target
    wrong: tuple[str, str, str] | None = None
    if kv_cache not in ("auto", "fp8"):
        wrong = "auto or fp8", kv_cache, "choose one of them"
    elif kv_cache == "fp8" and target.runtime != "tensorrt_llm":
        wrong = "a TensorRT-LLM target", f"{target.name}, {target.runtime}", "choose another --target, or --kv-cache auto"
    elif kv_cache == "fp8" and target.gpu is not None and _capability(target.gpu) < _FP8_CAPABILITY:
        card = f"{target.name}, {target.gpu.compute_capability}"
        wrong = "compute capability 8.9 or higher", card, "choose another --target, or --kv-cache auto"
    elif kv_cache == "fp8" and target.precision == "fp32":
        wrong = "a precision narrower than fp32", "fp32", "choose --precision bf16 or fp16, or --kv-cache auto"
    if wrong is not None:
        expected, found, remedy = wrong
        raise TargetError(f"--kv-cache {kv_cache}", expected=expected, found=found, remedy=remedy)
    return dataclasses.replace(target, kv_cache=kv_cache)  # type: ignore[arg-type]


def _capability(gpu: Gpu) -> tuple[int, ...]:
    return tuple(int(part) for part in gpu.compute_capability.split("."))
