"""The research code's ``ckpt.pt``, presented in Hugging Face names. The conversion is exact: only views are taken.

`model_args` become config keys; ``c_fc`` is split into its halves u (``up_proj``) and v (``gate_proj``); vectors
gain the trailing axis of the Hugging Face layout. The research position code and the SwiGLU have no counterpart
in the published Hugging Face model: the config carries them as ``position_code``, ``gated_mlp``, ``mlp_norm_eps``.
"""

from __future__ import annotations

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

RESEARCH_FILE = "ckpt.pt"
# What torch.compile, DistributedDataParallel, FSDP and activation checkpointing put into names.
WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ARGS = frozenset({"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout", "use_nGPT", "base_scale"})
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

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
        NGPTSpec.from_config(self.config)  # bounds the sizes that the table of names is made from
        self._state = _plain_names(state)
        self._moves = _moves(self.config)
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


def _moves(config: Mapping[str, Any]) -> dict[str, Move]:
    """Hugging Face name to (research name, view)."""

    def same(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def column(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(-1)

    def half(tensor: torch.Tensor, second: bool) -> torch.Tensor:
        if tensor.ndim == 0:
            return tensor  # misshapen: left for the shape check, which names it
        middle = tensor.shape[0] // 2
        return tensor[middle:] if second else tensor[:middle]

    def first_half(tensor: torch.Tensor) -> torch.Tensor:
        return half(tensor, second=False)

    def second_half(tensor: torch.Tensor) -> torch.Tensor:
        return half(tensor, second=True)

    moves: dict[str, Move] = {
        "model.embed_tokens.weight": ("transformer.wte.weight", same),
        "lm_head.weight": ("lm_head.weight", same),
        "sz.weight": ("sz", column),
    }
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias") if config["mlp_bias"] else ("weight",):
            for to, source in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "att_c_proj")):
                moves[f"{ours}self_attn.{to}_proj.{kind}"] = (f"{theirs}{source}.{kind}", same)
            moves[f"{ours}mlp.up_proj.{kind}"] = (f"{theirs}c_fc.{kind}", first_half)
            moves[f"{ours}mlp.gate_proj.{kind}"] = (f"{theirs}c_fc.{kind}", second_half)
            moves[f"{ours}mlp.down_proj.{kind}"] = (f"{theirs}mlp_c_proj.{kind}", same)
        moves[f"{ours}self_attn.sqk.weight"] = (theirs + "sqk", column)
        moves[f"{ours}mlp.suv.weight"] = (theirs + "suv", column)
        moves[f"{ours}attn_alpha"] = (theirs + "attn_alpha", same)
        moves[f"{ours}mlp_alpha"] = (theirs + "mlp_alpha", same)
    return moves
