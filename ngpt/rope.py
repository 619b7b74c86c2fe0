"""Rotary frequencies in NumPy float64, computed here and not taken from transformers.

The formulas are the ecosystem's usual ones: "default" (Su et al., arXiv:2104.09864), "linear" (position
interpolation, arXiv:2306.15595), "llama3" (Llama 3.1's published inference code) and "yarn" (Peng et al.,
arXiv:2309.00071). Types whose frequencies depend on the running length are refused by name: an engine bakes
its frequencies in. "custom_wavelengths" was named once and never defined, so it is refused as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ngpt.checks import is_finite, is_one
from ngpt.errors import ConfigError, UnsupportedError, shown

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
REFUSED_ROPE_TYPES = {
    "dynamic": "its frequencies depend on the running length",
    "longrope": "its frequencies depend on the running length",
    "custom_wavelengths": "its definition was never published",
}
_OLDER_NAMES = {"su": "longrope"}
_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_ORIGINAL_LENGTH = "original_max_position_embeddings"
_TYPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    # `linear` never reads the original length, but files in the wild carry it.
    "linear": frozenset({"factor", _ORIGINAL_LENGTH}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL_LENGTH}),
    "yarn": frozenset(
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"} | {_ORIGINAL_LENGTH}
    ),
}


@dataclass(frozen=True)
class Rope:
    """What a network needs to know about its rotary code.

    ``inv_freq``: float64 [rotary_dim // 2], radians per position. ``scaling`` multiplies cos and sin.
    """

    rope_type: str
    theta: float
    rotary_dim: int
    inv_freq: tuple[float, ...]
    scaling: float


def rope_from_config(config: Mapping[str, Any], *, head_dim: int, max_length: int) -> Rope:
    """Read either spelling (``rope_theta`` + ``rope_scaling``, or ``rope_parameters``) into a `Rope`.

    Raises `ConfigError` where spellings disagree or a value is impossible, `UnsupportedError` for rope types an
    engine cannot have.
    """
    params = _merged_parameters(config)
    kind = _rope_type(params)
    unknown = sorted(set(params) - _COMMON_KEYS - _TYPE_KEYS[kind])
    if unknown:
        raise ConfigError(
            f"rope parameter {shown(unknown[0])} is unknown for rope_type {kind!r}",
            found=f"{shown(unknown[0])}: {shown(params[unknown[0]])}",
            expected="one of " + ", ".join(sorted(_TYPE_KEYS[kind] | _COMMON_KEYS)),
            remedy="remove the key or correct rope_type in config.json",
        )
    theta = _number(params, "rope_theta", 1e6, above=0.0)
    fraction = _number(params, "partial_rotary_factor", 1.0, above=0.0)
    if fraction > 1.0:
        raise ConfigError("partial_rotary_factor", expected="a number in (0, 1]", found=shown(fraction))
    rotary_dim = int(head_dim * fraction)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            "the number of rotary channels, int(head_dim * partial_rotary_factor)",
            expected="an even number of at least 2",
            found=f"{rotary_dim} (head_dim {head_dim}, partial_rotary_factor {fraction:g})",
            remedy="correct head_dim or partial_rotary_factor in config.json",
        )
    try:
        with np.errstate(all="ignore"):  # what overflows is found in the result, by NGPTSpec
            inv_freq, scaling = _frequencies(kind, params, theta, rotary_dim, max_length)
    except (ArithmeticError, ValueError) as error:
        raise ConfigError(
            f"the parameters of rope_type {kind!r}",
            expected="values with finite frequencies",
            found=shown(dict(params)),
            remedy="correct them in config.json",
        ) from error
    return Rope(kind, theta, rotary_dim, tuple(float(w) for w in inv_freq), scaling)


def tidy_rope(block: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(a rope block with today's names and without what says nothing, the keys that were left out).

    Left out: ``finetuned``, a remark about training; ``attn_factor`` and ``extrapolation_factor`` of 1, other factors
    of YaRN's first code (any other value stays, to be refused by name); ``factor`` 1 and the original length of type
    default; and, not worth a word, what is null.
    """
    kept = {key: value for key, value in block.items() if value is not None}
    for key in ("type", "rope_type"):
        if isinstance(kept.get(key), str):
            kept[key] = _OLDER_NAMES.get(kept[key], kept[key])
    plain = kept.get("rope_type", kept.get("type", "default")) == "default"
    foreign = [
        key
        for key, value in kept.items()
        if key == "finetuned"
        or (key in ("attn_factor", "extrapolation_factor") and is_one(value))
        or (plain and ((key == "factor" and is_one(value)) or key == _ORIGINAL_LENGTH))
    ]
    return {key: value for key, value in kept.items() if key not in foreign}, tuple(foreign)


def research_inv_freq(head_dim: int) -> tuple[float, ...]:
    """Angular frequencies w_j = 10000**(-2j / head_dim) of the research code's position code, [head_dim // 2]."""
    return tuple(float(w) for w in _plain_frequencies(10000.0, head_dim))


def research_tables(inv_freq: tuple[float, ...], length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The research position code's S and C, both float64 [length, len(inv_freq)].

    With the interleaved table t[p, 2j] = sin(p w_j), t[p, 2j + 1] = cos(p w_j), S is t's first half of the
    channels and C its second half. The code maps x to out[2i] = -x[2i + 1] * C[p, i] and
    out[2i + 1] = x[2i] * S[p, i]: not a rotation.
    """
    angle = np.arange(length, dtype=np.float64)[:, None] * np.asarray(inv_freq, dtype=np.float64)
    table = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(length, -1)
    half = len(inv_freq)
    return table[:, :half], table[:, half:]


def _merged_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """One flat dict out of every place where rope facts may stand; equal duplicates merge, others are refused."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}

    def add(key: str, value: Any, where: str) -> None:
        if key in merged and merged[key] != value:
            raise ConfigError(
                f"config.json states {shown(key)} twice with different values",
                expected=f"one value ({origin[key]} says {shown(merged[key])})",
                found=f"{where} says {shown(value)}",
                remedy="keep one spelling",
            )
        merged[key] = value
        origin[key] = where

    for block in ("rope_scaling", "rope_parameters"):
        given = config.get(block)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ConfigError(block, expected="an object or null", found=shown(given))
        for key, value in tidy_rope(given)[0].items():
            if isinstance(value, Mapping):
                raise ConfigError(
                    f"{block}.{shown(key)}",
                    expected="a single value",
                    found="an object",
                    remedy="per-layer rope parameters do not exist in nGPT",
                )
            if value is not None:
                add("rope_type" if key == "type" else key, value, f"{block}.{key}")
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            add(key, config[key], key)
    return merged


def _rope_type(params: Mapping[str, Any]) -> str:
    kind = params.get("rope_type", "default")
    if isinstance(kind, str) and kind in REFUSED_ROPE_TYPES:
        raise UnsupportedError(
            f"rope_type {kind!r} is not supported in an engine: {REFUSED_ROPE_TYPES[kind]}",
            expected="one of " + ", ".join(ROPE_TYPES),
            found=kind,
            remedy="run this checkpoint through the PyTorch model if it supports the type, or retrain",
        )
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise ConfigError("rope_type", expected="one of " + ", ".join(ROPE_TYPES), found=shown(kind))
    return str(kind)


def _number(params: Mapping[str, Any], key: str, default: float | None, *, above: float | None = None) -> float:
    value = params.get(key, default)
    if value is None:
        raise ConfigError(f"rope parameter {key!r} is missing", expected="a number", remedy="add it to config.json")
    if not is_finite(value):
        raise ConfigError(f"rope parameter {key!r}", expected="a finite number", found=shown(value))
    if above is not None and value <= above:
        raise ConfigError(f"rope parameter {key!r}", expected=f"a number above {above:g}", found=shown(value))
    return float(value)


def _plain_frequencies(theta: float, dim: int) -> NDArray[np.float64]:
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    frequencies: NDArray[np.float64] = 1.0 / theta**exponent
    return frequencies


def _frequencies(
    kind: str, params: Mapping[str, Any], theta: float, dim: int, max_length: int
) -> tuple[NDArray[np.float64], float]:
    plain = _plain_frequencies(theta, dim)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / _number(params, "factor", None, above=0.0), 1.0
    if kind == "llama3":
        return _llama3(plain, params, max_length), 1.0
    return _yarn(plain, params, theta, dim, max_length)


def _llama3(plain: NDArray[np.float64], params: Mapping[str, Any], max_length: int) -> NDArray[np.float64]:
    """Long wavelengths are slowed by ``factor``, short ones kept, those between blended linearly."""
    factor = _number(params, "factor", None, above=0.0)
    low = _number(params, "low_freq_factor", None, above=0.0)
    high = _number(params, "high_freq_factor", None, above=0.0)
    original = _number(params, _ORIGINAL_LENGTH, max_length, above=0.0)
    if high <= low:
        raise ConfigError("high_freq_factor", expected=f"more than low_freq_factor ({low:g})", found=f"{high:g}")
    turns = original * plain / (2 * math.pi)  # rotations over the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    slowed: NDArray[np.float64] = (1 - blend) * plain / factor + blend * plain
    return slowed


def _yarn(
    plain: NDArray[np.float64], params: Mapping[str, Any], theta: float, dim: int, max_length: int
) -> tuple[NDArray[np.float64], float]:
    """Interpolate slow channels, extrapolate fast ones, ramp between; scale cos and sin by a temperature."""
    original = _number(params, _ORIGINAL_LENGTH, max_length, above=0.0)
    factor = _number(params, "factor", max_length / original, above=0.0)
    fast = _number(params, "beta_fast", 32.0, above=0.0)
    slow = _number(params, "beta_slow", 1.0, above=0.0)
    if theta == 1.0:
        raise ConfigError("rope_theta", expected="a value other than 1 with yarn", found="1")
    if fast < slow:
        raise ConfigError("beta_fast", expected=f"at least beta_slow ({slow:g})", found=f"{fast:g}")

    def channel(turns: float) -> float:
        """Channel pair whose frequency completes ``turns`` rotations over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(fast), channel(slow)
    truncate = params.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError("rope parameter 'truncate'", expected="true or false", found=shown(truncate))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = (last - first) or 0.001
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float64) - first) / width, 0.0, 1.0)
    inv_freq = plain / factor * interpolated + plain * (1 - interpolated)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if params.get("attention_factor") is not None:
        return inv_freq, _number(params, "attention_factor", None, above=0.0)
    over, under = params.get("mscale"), params.get("mscale_all_dim")
    if over and under:
        scale = temperature(_number(params, "mscale", None)) / temperature(_number(params, "mscale_all_dim", None))
        return inv_freq, scale
    return inv_freq, temperature(1.0)
