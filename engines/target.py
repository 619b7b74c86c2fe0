"""Targets: what an engine is built for, one TOML file each under engines/targets."""

import dataclasses
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ngpt.errors import TargetError

FOLDER = Path(__file__).parent / "targets"
DEFAULT = "cpu-int8"
AUTO = "auto"
_FP8_CAPABILITY = (8, 9)  # the first with float8 conversions: Ada


@dataclass(frozen=True)
class Gpu:
    """A card: compute capability such as "9.0" ("": any that the library supports), memory in 10**9 bytes, memory bandwidth in
    10**9 bytes per second."""

    compute_capability: str
    memory_gb: float
    bandwidth_gb_per_s: float


@dataclass(frozen=True)
class Profile:
    """What a plan is optimised for: the longest piece of a prompt read at once (TensorRT-LLM: the most tokens of a step), and the
    most sequences decoded at once."""

    prefill_tokens: int
    decode_batch: int


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

    @property
    def on_onnx(self) -> bool:
        """Whether the engine is an ONNX graph."""
        return self.runtime == "onnxruntime"


def target_names() -> list[str]:
    """Names of all targets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_target(name: str, precision: str | None = None) -> Target:
    """Read a target by name, in its own precision or another that it offers.

    Raises TargetError for an unknown name, a precision the target does not offer, or a malformed file.
    """
    if name not in target_names():
        raise TargetError(
            f"unknown target {name!r}", expected="one of " + ", ".join(target_names()), remedy="pass one of them as --target"
        )
    path = FOLDER / f"{name}.toml"
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TargetError(f"{path} is not TOML", found=str(error)) from error
    optional = {field.name for field in fields(Target) if field.default is not dataclasses.MISSING}
    wanted = {field.name for field in fields(Target)} - {"name"}
    if missing := sorted(wanted - optional - set(values)):
        raise TargetError(f"{path} lacks keys", expected=", ".join(sorted(wanted)), found=f"no {', '.join(missing)}")
    if unknown := sorted(set(values) - wanted):
        raise TargetError(f"{path} has unknown keys", expected=", ".join(sorted(wanted)), found=", ".join(unknown))
    try:
        values |= {"gpu": Gpu(**values["gpu"])} if "gpu" in values else {}
        values |= {"profile": Profile(**values["profile"])} if "profile" in values else {}
    except TypeError as error:
        raise TargetError(f"{path} has wrong keys under gpu or profile", found=str(error)) from error
    for key in ("providers", "precisions"):
        values[key] = tuple(values.get(key, ()))
    target = Target(name=name, **values)
    if precision is None or precision == target.precision:
        return target
    if precision not in target.precisions:
        raise TargetError(
            f"precision of the target {name}", expected=", ".join(target.precisions or (target.precision,)), found=precision,
            remedy="choose another --precision or --target",
        )  # fmt: skip
    return dataclasses.replace(target, precision=precision)  # type: ignore[arg-type]


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
