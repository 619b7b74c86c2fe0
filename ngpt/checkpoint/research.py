"""The research code's ``ckpt.pt``, presented in Hugging Face names. The conversion is exact: only views are taken.

`model_args` become config keys; ``c_fc`` is split into its halves u (``up_proj``) and v (``gate_proj``); vectors
gain the trailing axis of the Hugging Face layout. The research position code and the SwiGLU have no counterpart
in the published Hugging Face model: the config carries them as ``position_code``, ``gated_mlp``, ``mlp_norm_eps``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ngpt.checkpoint.safetensors_file import TensorInfo
from ngpt.checkpoint.torch_file import load_torch_file
from ngpt.checks import is_finite, is_whole, whole
from ngpt.errors import (
    CheckpointError,
    ConfigError,
    DtypeError,
    MissingTensorError,
    ShapeError,
    UnexpectedTensorError,
    shown,
)
from ngpt.spec import NGPTSpec
from ngpt.tensor_names import expected_tensors

RESEARCH_FILE = "ckpt.pt"
# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing put into names.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ARGS = frozenset({"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout", "use_nGPT", "base_scale"})
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_LAYER = re.compile(r"\.(\d+)\.")

Move = tuple[str, Callable[[torch.Tensor], torch.Tensor]]


class ResearchSource:
    """Tensors of a research checkpoint under Hugging Face names; ``config`` is the equivalent config."""

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        self.places: dict[str, Path] = {}
        stored = load_torch_file(path)
        arguments = stored.get("model_args")
        state = stored.get("model")
        if not isinstance(arguments, Mapping) or not isinstance(state, Mapping):
            raise CheckpointError(
                f"{path} is not a research checkpoint",
                expected="a dict with 'model' and 'model_args'",
                found=", ".join(f"{shown(key)}: {type(stored[key]).__name__}" for key in list(stored)[:8]) or "an empty dict",
            )
        self.config = research_config(arguments)
        spec = NGPTSpec.from_config(self.config)  # bounds the sizes that the map of names is made from
        self._state = _plain_names(state)
        self._moves = _moves(spec)
        known = {source for source, _ in self._moves.values()}
        missing = sorted(known - set(self._state))
        if missing:
            raise MissingTensorError(
                f"{path} lacks {shown(missing[0])}",
                expected=f"{len(known)} tensors",
                found=f"{len(missing)} missing",
            )
        extra = sorted(set(self._state) - known)
        if extra:
            raise UnexpectedTensorError(
                f"{path} holds {shown(extra[0])}", expected=f"{len(known)} tensors", found=f"{len(extra)} unknown"
            )
        self.infos = {name: self._info(name) for name in self._moves}

    def _info(self, name: str) -> TensorInfo:
        tensor = self.get(name)
        return TensorInfo(_DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))

    def get(self, name: str) -> torch.Tensor:
        """A view of the stored tensor in Hugging Face shape."""
        source, move = self._moves[name]
        return move(self._state[source])

    def close(self) -> None:
        """Nothing to do: the mapping lives as long as the tensors."""


def research_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`model_args` to a Hugging Face config dict. Raises `ConfigError` for a baseline (not nGPT) checkpoint."""
    arguments = {key: whole(value) for key, value in arguments.items() if key in _ARGS or value is not None}
    unknown = sorted(shown(key) for key in arguments if key not in _ARGS)
    if unknown:
        raise ConfigError(f"model_args has an unknown key {unknown[0]}", expected=", ".join(sorted(_ARGS)))
    missing = sorted(_ARGS - {"dropout", "bias"} - set(arguments))
    if missing:
        raise ConfigError(f"model_args lacks {missing[0]!r}")
    for key in ("use_nGPT", "bias"):
        stated = False if arguments.get(key) is None else arguments[key]
        if not isinstance(stated, int) or stated not in (0, 1):
            raise ConfigError(f"model_args.{key}", expected="0 or 1", found=shown(stated))
    if not arguments["use_nGPT"]:
        raise ConfigError(
            "this research checkpoint is the baseline GPT, not nGPT: use_nGPT",
            expected="1",
            found=shown(arguments["use_nGPT"]),
            remedy="train with use_nGPT = 1",
        )
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        if not is_whole(arguments[key]) or arguments[key] < 1:
            raise ConfigError(f"model_args.{key}", expected="a positive whole number", found=shown(arguments[key]))
    if not is_finite(arguments["base_scale"]):
        raise ConfigError("model_args.base_scale", expected="a finite number", found=shown(arguments["base_scale"]))
    width, heads = arguments["n_embd"], arguments["n_head"]
    if width % heads:
        raise ConfigError("model_args.n_embd", expected=f"a multiple of n_head ({heads})", found=str(width))
    bias = bool(arguments.get("bias", False))
    return {
        "model_type": "ngpt",
        "architectures": ["NGPTForCausalLM"],
        "vocab_size": arguments["vocab_size"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": arguments["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": arguments["block_size"],
        "initializer_range": arguments["base_scale"],
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "partial_rotary_factor": 1.0,
        "attention_bias": bias,
        "mlp_bias": bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "sqk_init_value": 1.0,
        "attn_alpha_init_value": 0.05,
        "suv_init_value": 1.0,
        "suv_init_scaling": 1.0,
        "mlp_alpha_init_value": 0.05,
        "sz_init_value": 1.0,
        "position_code": "research",
        "gated_mlp": True,
        "mlp_norm_eps": 0.0,
    }


def _plain_names(state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    plain: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"model[{shown(key)}]", expected="a tensor", found=type(value).__name__)
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in plain:
            raise UnexpectedTensorError(
                f"tensor {shown(name)} is stored twice", found="with and without " + " or ".join(sorted(WRAPPERS))
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise DtypeError(f"tensor {shown(name)}", expected="plain numbers", found=f"{value.layout} on {value.device}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ShapeError(
                f"tensor {shown(name)} repeats what it stores",
                expected=f"{value.numel()} stored numbers for the shape {shown(list(value.shape))}",
                found=f"{value.untyped_storage().nbytes()} bytes",
                remedy="save it with .contiguous()",
            )
        plain[name] = value.detach()
    return plain


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(-1)


def _first_half(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor[: tensor.shape[0] // 2] if tensor.ndim else tensor
    )  # a misshapen one is left for the shape check, which names it


def _second_half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[tensor.shape[0] // 2 :] if tensor.ndim else tensor


# Hugging Face name -> research name, and the view. Names of products stand for the weight and the bias; {} is a layer's number.
NAMES: dict[str, Move] = {
    "model.embed_tokens": ("transformer.wte", _same),
    "model.layers.{}.self_attn.q_proj": ("transformer.h.{}.query", _same),
    "model.layers.{}.self_attn.k_proj": ("transformer.h.{}.key", _same),
    "model.layers.{}.self_attn.v_proj": ("transformer.h.{}.value", _same),
    "model.layers.{}.self_attn.sqk.weight": ("transformer.h.{}.sqk", _column),
    "model.layers.{}.self_attn.o_proj": ("transformer.h.{}.att_c_proj", _same),
    "model.layers.{}.attn_alpha": ("transformer.h.{}.attn_alpha", _same),
    "model.layers.{}.mlp.up_proj": ("transformer.h.{}.c_fc", _first_half),
    "model.layers.{}.mlp.gate_proj": ("transformer.h.{}.c_fc", _second_half),
    "model.layers.{}.mlp.suv.weight": ("transformer.h.{}.suv", _column),
    "model.layers.{}.mlp.down_proj": ("transformer.h.{}.mlp_c_proj", _same),
    "model.layers.{}.mlp_alpha": ("transformer.h.{}.mlp_alpha", _same),
    "lm_head": ("lm_head", _same),
    "sz.weight": ("sz", _column),
}


def _moves(spec: NGPTSpec) -> dict[str, Move]:
    """Hugging Face name -> (research name, view) for every tensor of a network."""
    moves = {}
    for name in expected_tensors(spec):
        layer = _LAYER.search(name)
        pattern, number = (_LAYER.sub(".{}.", name, count=1), layer[1]) if layer else (name, "")
        product, _, kind = pattern.rpartition(".")
        source, view = NAMES[pattern] if pattern in NAMES else NAMES[product]
        moves[name] = (source.format(number) + ("" if pattern in NAMES else f".{kind}"), view)
    return moves
