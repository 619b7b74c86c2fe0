"""Targets: what an engine is built for, one TOML file each under engines/targets."""

import dataclasses
import os
import re
import tomllib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engines.runtimes import precision_of, runtime_of
from export.precision import Precision
from ngpt.errors import TargetError, shown

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
    10**9 bytes per second.

    cards: the names, or parts of names, by which its driver calls it: `auto` takes the target for these. A target without
    them is taken when it is named, and never by itself.
    """

    compute_capability: str
    memory_gb: float
    bandwidth_gb_per_s: float
    cards: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        capability = self.compute_capability
        good = isinstance(capability, str) and re.fullmatch(r"([0-9]{1,3}\.[0-9]{1,2})?", capability)
        _require("gpu.compute_capability", bool(good), 'a text such as "9.0", or ""', capability)
        for key in ("memory_gb", "bandwidth_gb_per_s"):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(f"gpu.{key}", number and 0 < value < 1e9, "a number above 0", value)
        _require(
            "gpu.cards", _texts(self.cards) and all(plain_name(card) for card in self.cards), 'texts such as "L40S"', self.cards
        )


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

    Form "ort" is ONNX with ONNX Runtime's kernels, "portable" standard ONNX, "native" a network of the runtime's own layers,
    "plugins" one with this project's kernels. cache: how keys and values are kept ("in-place", "growing", "paged").
    providers: of ONNX Runtime, in order.
    precisions: the names of those on offer. gpu, profile: for runtimes on a GPU, and for them alone. Raises TargetError,
    naming the key.
    """

    name: str
    description: str
    runtime: str
    form: str
    precision: Precision
    cache: str
    executed: bool
    note: str
    providers: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    gpu: Gpu | None = None
    profile: Profile | None = None

    def __post_init__(self) -> None:
        runtime = runtime_of(self.runtime)
        for key, choices in (("form", runtime.forms), ("cache", runtime.caches)):
            _require(key, getattr(self, key) in choices, "one of " + ", ".join(choices), getattr(self, key))
        for key in ("name", "description", "note"):
            value = getattr(self, key)
            _require(key, isinstance(value, str) and len(value) <= _MAX_NOTE, f"a text of at most {_MAX_NOTE} characters", value)
        _require("executed", isinstance(self.executed, bool), "true or false", self.executed)
        _require("providers", _texts(self.providers), "a list of texts", self.providers)
        offered = _texts(self.precisions) and all(item in runtime.precisions for item in self.precisions)
        _require("precisions", offered, "a list of some of " + ", ".join(runtime.precisions), self.precisions)
        _require("gpu", self.gpu is None or isinstance(self.gpu, Gpu), "a table", self.gpu)
        _require("profile", self.profile is None or isinstance(self.profile, Profile), "a table", self.profile)
        for key in ("gpu", "profile"):
            given = getattr(self, key)
            _require(key, (given is not None) == runtime.on_gpu, "a table for runtimes on a GPU, and for them alone", given)
        _require("providers", runtime.on_gpu or bool(self.providers), f"at least one for {self.runtime}", self.providers)


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


def load_target(name: str | os.PathLike[str], precision: str | None = None) -> Target:
    """A target by the name of one of ours, or by the path of a file of your own (`card.toml`, `targets/card.toml`).

    In its own precision or another that it offers. Raises TargetError for an unknown name, a precision the target does not
    offer, or a malformed file.
    """
    given = os.fspath(name)
    own = given not in target_names()
    if own and not given.endswith(".toml"):
        raise TargetError(
            f"unknown target {given[:200]!r}",
            expected="one of " + ", ".join(target_names()) + ", or the path of a .toml file",
            remedy="pass one of them as --target",
        )
    path = Path(given) if own else FOLDER / f"{given}.toml"
    try:
        if own and not path.stem.isprintable():
            raise TargetError("the file's name", expected="characters that can be printed", found=ascii(path.stem)[:200])
        target = _read(path.stem, path)
    except TargetError as error:
        remedy = f"correct {path}, or " + ("give another --target" if own else "remove it")
        raise TargetError(f"{path.name}: {error.what}", expected=error.expected, found=error.found, remedy=remedy) from error
    if precision is None or precision == target.precision.name:
        return target
    if precision not in target.precisions:
        raise TargetError(
            f"precision of the target {target.name}",
            expected=", ".join(target.precisions or (target.precision.name,)),
            found=precision[:200],
            remedy="choose another --precision or --target",
        )
    return dataclasses.replace(target, precision=precision_of(target.runtime, precision))


def _read(name: str, path: Path) -> Target:
    """The target in a file. Raises TargetError without the file's name or a remedy."""
    try:
        if not path.is_file():
            raise TargetError("not a file that can be read", found="" if os.path.lexists(path) else "no such file")
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
            values[key] = kind(**_tuples(values[key], "cards"))
    values["precision"] = precision_of(runtime_of(values["runtime"]).name, values["precision"])
    return Target(name=name, **_tuples(values, "providers", "precisions"))


def _tuples(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    return table | {key: tuple(table[key]) for key in keys if isinstance(table.get(key), list)}


def _keys(what: str, table: Iterable[str], kind: Any, but: tuple[str, ...] = ()) -> None:
    """Hold the keys of a table against the fields of the dataclass `kind`."""
    known = {field.name: field.default is dataclasses.MISSING for field in fields(kind) if field.name not in but}
    needed = {key for key, required in known.items() if required}
    if missing := sorted(needed - set(table)):
        raise TargetError(f"{what} lacks keys", expected=", ".join(sorted(needed)), found=f"no {', '.join(missing)}")
    if unknown := sorted(set(table) - set(known)):
        raise TargetError(f"{what} has unknown keys", expected=", ".join(sorted(known)), found=", ".join(unknown)[:200])


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def plain_name(card: str) -> str:
    """The letters and digits of a card's name, by which names are compared."""
    return re.sub(r"[^a-z0-9]", "", card.lower())


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 31


def _require(key: str, holds: bool, expected: str, found: object) -> None:
    if not holds:
        raise TargetError(key, expected=expected, found=shown(found, 200))


def with_kv_cache(target: Target, kv_cache: str) -> Target:
    """The target with keys and values cached as `kv_cache`: "auto" (the arithmetic's own type) or "fp8" (float8_e4m3).

    Raises TargetError where "fp8" has no meaning: a runtime that has no such cache, a card without float8, or fp32.
    """
    wrong: tuple[str, str, str] | None = None
    if kv_cache == "auto":
        return target
    if kv_cache != "fp8":
        wrong = "auto or fp8", kv_cache, "choose one of them"
    elif not runtime_of(target.runtime).float8_cache:
        wrong = "a TensorRT-LLM target", f"{target.name}, {target.runtime}", "choose another --target, or --kv-cache auto"
    elif target.gpu is not None and _capability(target.gpu) < _FP8_CAPABILITY:
        card = f"{target.name}, {target.gpu.compute_capability}"
        wrong = "compute capability 8.9 or higher", card, "choose another --target, or --kv-cache auto"
    elif target.precision.arithmetic == "float32":
        wrong = "a precision narrower than fp32", target.precision.name, "choose --precision bf16 or fp16, or --kv-cache auto"
    if wrong is not None:
        expected, found, remedy = wrong
        raise TargetError(f"--kv-cache {kv_cache}", expected=expected, found=found, remedy=remedy)
    return dataclasses.replace(target, precision=target.precision.with_cache("float8_e4m3"))


def _capability(gpu: Gpu) -> tuple[int, ...]:
    return tuple(int(part) for part in gpu.compute_capability.split("."))
