"""`NGPTSpec`: what a deployed nGPT network is, frozen and validated.

Exporters, engines and checkpoint readers read this and never ``config.json``. `NGPTSpec.from_config` is the one
place where the config's spelling is interpreted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ngpt.checks import is_finite, is_whole
from ngpt.config_keys import DEFAULTS, tidy
from ngpt.errors import ConfigError, UnsupportedError, shown
from ngpt.rope import Rope, research_inv_freq, rope_from_config

Activation = Literal["relu2", "relu", "silu", "gelu", "gelu_tanh"]
PositionCode = Literal["rope", "research"]

# Names in the wild to ours; gelu's three tanh spellings are one function.
ACTIVATIONS: dict[str, Activation] = {
    "relu2": "relu2",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}

# Bounds keep a hostile config from asking for tables of billions of entries. They are far above any real model.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 26,
}


@dataclass(frozen=True, kw_only=True)
class NGPTSpec:
    """An nGPT network. Sizes are counts; scales are plain factors.

    ``sqk_scale``, ``attn_alpha_scale``, ``mlp_alpha_scale``, ``suv_scale`` (without the sqrt(hidden_size)) and
    ``sz_scale`` multiply the stored parameters. ``inv_freq`` is float64, radians per position, one per rotary
    channel pair; ``rope_attention_scaling`` multiplies cos and sin (yarn). ``mlp`` is the activation; ``gated``
    means u * act(v) with u and v two halves of the intermediate scales. ``sz_folded``: the head's rows hold sz * sz_scale
    already, and no sz is stored. Raises `ConfigError` when inconsistent.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int
    mlp: Activation
    gated: bool
    mlp_eps: float
    position: PositionCode
    rotary_dim: int
    rope_type: str
    rope_theta: float
    inv_freq: tuple[float, ...]
    rope_attention_scaling: float
    attention_bias: bool
    mlp_bias: bool
    tied: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    sqk_scale: float
    attn_alpha_scale: float
    mlp_alpha_scale: float
    suv_scale: float
    sz_scale: float
    sz_folded: bool

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_attention_heads",
                expected=f"a multiple of num_key_value_heads ({self.num_kv_heads})",
                found=str(self.num_heads),
                remedy="correct the head counts in config.json",
            )
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise ConfigError("rotary channels", expected=f"even, 2 to {self.head_dim}", found=str(self.rotary_dim))
        if len(self.inv_freq) != self.rotary_dim // 2 or not all(map(math.isfinite, self.inv_freq)):
            raise ConfigError("inv_freq", expected=f"{self.rotary_dim // 2} finite values")
        if self.sz_folded and self.tied:
            raise ConfigError(
                "sz_folded",
                expected="tie_word_embeddings false: the embedding table must not be scaled",
                found="both true",
                remedy="fold the scales of the original checkpoint: that unties the head",
            )
        if self.mlp not in get_args(Activation):
            raise ConfigError("mlp activation", expected=", ".join(get_args(Activation)), found=shown(self.mlp))
        if self.position == "research" and (
            self.num_kv_heads != self.num_heads or self.rotary_dim != self.head_dim or self.rope_attention_scaling != 1.0
        ):
            raise ConfigError(
                "position_code 'research'",
                expected="multi-head attention with every channel encoded and no rope scaling",
                found=f"{self.num_heads} heads on {self.num_kv_heads}, {self.rotary_dim} of {self.head_dim} channels",
            )
        scales = [field.name for field in dataclasses.fields(self) if field.name.endswith(("_scale", "_scaling"))]
        if endless := [name for name in scales if not math.isfinite(getattr(self, name))]:
            raise ConfigError(endless[0], expected="a finite factor", remedy="correct the init values in config.json")
        token_ids = {"bos_token_id": self.bos_token_id, "pad_token_id": self.pad_token_id}
        token_ids |= {f"eos_token_id[{i}]": token for i, token in enumerate(self.eos_token_ids)}
        for name, token in token_ids.items():
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(
                    name,
                    expected=f"a token id below vocab_size ({self.vocab_size})",
                    found=shown(token),
                    remedy="correct the token id or vocab_size in config.json",
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NGPTSpec:
        """Interpret ``config.json``'s dict; both rope spellings; absent keys take the 8B model's values.

        Keys that change nothing are passed over: `ngpt.config_keys.tidy` says which. Raises `ConfigError` naming the key
        (not nGPT, unknown, wrong type, contradictory), `UnsupportedError`.
        """
        _check_kind(config)
        config, _ = tidy(config)
        sizes = {key: _size(config, key) for key in _LIMITS if key != "head_dim"}
        head_dim = _head_dim(config, sizes["hidden_size"], sizes["num_attention_heads"])
        r = _scale(config, "initializer_range", nonzero=True)
        position = _choice(config, "position_code", get_args(PositionCode))
        rope = rope_from_config(
            config,
            head_dim=head_dim,
            max_length=sizes["max_position_embeddings"],
        )
        if position == "research":
            rope = _research_rope(config, rope, head_dim)
        _check_dropout(config)
        _flag(config, "use_cache")
        eps = _scale(config, "mlp_norm_eps")
        if eps < 0:
            raise ConfigError("mlp_norm_eps", expected="0 or more", found=shown(eps))
        return cls(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            num_kv_heads=sizes["num_key_value_heads"],
            head_dim=head_dim,
            max_length=sizes["max_position_embeddings"],
            mlp=ACTIVATIONS[_choice(config, "hidden_act", tuple(ACTIVATIONS))],
            gated=_flag(config, "gated_mlp"),
            mlp_eps=eps,
            position="research" if position == "research" else "rope",
            rotary_dim=rope.rotary_dim,
            rope_type=rope.rope_type,
            rope_theta=rope.theta,
            inv_freq=rope.inv_freq,
            rope_attention_scaling=rope.scaling,
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            tied=_flag(config, "tie_word_embeddings"),
            bos_token_id=_token(config, "bos_token_id"),
            eos_token_ids=_eos_tokens(config),
            pad_token_id=_token(config, "pad_token_id"),
            sqk_scale=_scale(config, "sqk_init_value") / r,
            attn_alpha_scale=_scale(config, "attn_alpha_init_value") / r,
            mlp_alpha_scale=_scale(config, "mlp_alpha_init_value") / r,
            suv_scale=_scale(config, "suv_init_value") / _scale(config, "suv_init_scaling", nonzero=True),
            sz_scale=_scale(config, "sz_init_value") / r,
            sz_folded=_flag(config, "sz_folded"),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; tuples become lists."""
        fields = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    def digest(self) -> str:
        """ "sha256:..." of the canonical JSON of `to_dict`: equal specs, equal digests, on any machine."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _check_kind(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if kind != "ngpt":
        raise ConfigError(
            "this is not an nGPT checkpoint: model_type",
            expected="'ngpt'",
            found=shown(kind) if kind is not None else "no model_type",
            remedy="point at the folder of an nGPT model, or at a research ckpt.pt",
        )
    if config.get("quantization_config") is not None:
        raise UnsupportedError(
            "quantization_config: checkpoints that are already quantised are not read",
            remedy="start from the original weights; the export quantises",
        )


def _value(config: Mapping[str, Any], key: str) -> Any:
    return config[key] if key in config else DEFAULTS[key]


def _size(config: Mapping[str, Any], key: str) -> int:
    value = _value(config, key)
    if key == "num_key_value_heads" and value is None:
        value = _value(config, "num_attention_heads")
    if not is_whole(value) or not 1 <= value <= _LIMITS[key]:
        raise ConfigError(key, expected=f"a whole number from 1 to {_LIMITS[key]}", found=shown(value))
    return int(value)


def _head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    if _value(config, "head_dim") is not None:
        return _size(config, "head_dim")
    if hidden % heads:
        raise ConfigError(
            "hidden_size",
            expected=f"a multiple of num_attention_heads ({heads}) where head_dim is null",
            found=str(hidden),
            remedy="state head_dim in config.json",
        )
    return hidden // heads


def _scale(config: Mapping[str, Any], key: str, *, nonzero: bool = False) -> float:
    value = _value(config, key)
    if not is_finite(value):
        raise ConfigError(key, expected="a finite number", found=shown(value))
    if nonzero and value <= 0:
        raise ConfigError(key, expected="a number above 0 (it divides the scales)", found=shown(value))
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = _value(config, key)
    if not isinstance(value, bool):
        raise ConfigError(key, expected="true or false", found=shown(value))
    return value


def _choice(config: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = _value(config, key)
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(key, expected="one of " + ", ".join(allowed), found=shown(value))
    return value


def _token(config: Mapping[str, Any], key: str) -> int | None:
    value = _value(config, key)
    if value is not None and not is_whole(value):
        raise ConfigError(key, expected="a token id or null", found=shown(value))
    return value


def _eos_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = _value(config, "eos_token_id")
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(map(is_whole, ids)):
        raise ConfigError("eos_token_id", expected="a token id, a list of them, or null", found=shown(value))
    return tuple(ids)


def _check_dropout(config: Mapping[str, Any]) -> None:
    if _value(config, "attention_dropout") is None:
        return
    value = _scale(config, "attention_dropout")
    if not 0 <= value < 1:
        raise ConfigError("attention_dropout", expected="a number in [0, 1)", found=shown(value))


def _research_rope(config: Mapping[str, Any], rope: Rope, head_dim: int) -> Rope:
    """The research position code has one fixed definition; a config that also asks for rope contradicts itself."""
    if rope.rope_type != "default" or rope.rotary_dim != head_dim:
        raise ConfigError(
            "position_code 'research'",
            expected="no rope scaling and partial_rotary_factor 1",
            found=f"rope_type {rope.rope_type!r}, {rope.rotary_dim} of {head_dim} channels",
        )
    stated = config.get("rope_theta")
    if stated is not None and stated != 10000.0:
        raise ConfigError("rope_theta", expected="10000 (or absent) with position_code 'research'", found=shown(stated))
    return Rope("default", 10000.0, head_dim, research_inv_freq(head_dim), 1.0)
