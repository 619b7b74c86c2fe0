"""The research code's ``ckpt.pt``, presented in Hugging Face names. The conversion is exact: only views are taken.

`model_args` become config keys; ``c_fc`` is split into its halves u (``up_proj``) and v (``gate_proj``); vectors
gain the trailing axis of the Hugging Face layout. The research position code and the SwiGLU have no counterpart
in the published Hugging Face model: the config carries them as ``position_code``, ``gated_mlp``, ``mlp_norm_eps``.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ngpt.checkpoint.safetensors_file import TensorInfo
from ngpt.errors import (
    CheckpointError,
    ConfigError,
    CorruptFileError,
    MissingTensorError,
    UnexpectedTensorError,
    UnsafeFormatError,
)

RESEARCH_FILE = "ckpt.pt"
COMPILE_PREFIX = "_orig_mod."
MAX_PICKLE_BYTES = 64 << 20  # the structure only; tensor bytes are separate members of the archive
_ARGS = frozenset({"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout", "use_nGPT"})
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

Move = tuple[str, Callable[[torch.Tensor], torch.Tensor]]


class ResearchSource:
    """Tensors of a research checkpoint under Hugging Face names; ``config`` is the equivalent config."""

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        stored = _load(path)
        arguments = stored.get("model_args")
        state = stored.get("model")
        if not isinstance(arguments, Mapping) or not isinstance(state, Mapping):
            raise CheckpointError(
                f"{path} is not a research checkpoint",
                expected="a dict with 'model' and 'model_args'",
                found=", ".join(sorted(map(str, stored))[:8]) or "an empty dict",
            )
        self.config = research_config(arguments)
        self._state = _plain_names(state)
        self._moves = _moves(self.config)
        known = {source for source, _ in self._moves.values()}
        missing = sorted(known - set(self._state))
        if missing:
            raise MissingTensorError(
                f"{path} lacks {missing[0]!r}",
                expected=f"{len(known)} tensors",
                found=f"{len(missing)} missing",
            )
        extra = sorted(set(self._state) - known)
        if extra:
            raise UnexpectedTensorError(
                f"{path} holds {extra[0]!r}", expected=f"{len(known)} tensors", found=f"{len(extra)} unknown"
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
    unknown = sorted(map(str, set(arguments) - _ARGS - {"base_scale"}))
    if unknown:
        raise ConfigError(f"model_args has an unknown key {unknown[0]!r}", expected=", ".join(sorted(_ARGS)))
    missing = sorted((_ARGS | {"base_scale"}) - {"dropout", "bias"} - set(arguments))
    if missing:
        raise ConfigError(f"model_args lacks {missing[0]!r}")
    if not arguments["use_nGPT"]:
        raise ConfigError(
            "this research checkpoint is the baseline GPT, not nGPT: use_nGPT",
            expected="1",
            found=repr(arguments["use_nGPT"]),
            remedy="train with use_nGPT = 1",
        )
    for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"):
        if isinstance(arguments[key], bool) or not isinstance(arguments[key], int) or arguments[key] < 1:
            raise ConfigError(f"model_args.{key}", expected="a positive whole number", found=repr(arguments[key]))
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


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            magic = file.read(2)
        if not zipfile.is_zipfile(path):
            raise _not_an_archive(path, magic)
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path)
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFormatError(
            f"{path} asks for objects beyond tensors and plain values",
            found=str(error).splitlines()[0][:160],
            remedy="do not load it unless you trust it; then re-save model and model_args alone",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CorruptFileError(
            f"{path} cannot be read", found=str(error)[:160], remedy="copy or download the file again"
        ) from error
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{path}", expected="a dict", found=type(stored).__name__)
    return stored


def _not_an_archive(path: Path, magic: bytes) -> CheckpointError:
    if magic in (b"", b"PK"):
        return CorruptFileError(
            f"{path} is truncated",
            expected="a complete zip archive",
            remedy="copy or download the file again",
        )
    return UnsafeFormatError(
        f"{path} is not an archive as torch.save writes it; a bare pickle can run code when loaded",
        expected="a zip archive",
        found=f"a file that starts with {magic!r}",
        remedy="re-save it where you trust it, with PyTorch 1.6 or later",
    )


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Torch stores members uncompressed; anything else could expand without bound."""
    for member in archive.infolist():
        if member.compress_type != zipfile.ZIP_STORED:
            raise UnsafeFormatError(f"{path}: member {member.filename!r} is compressed", expected="stored members")
        if member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES:
            raise UnsafeFormatError(
                f"{path}: member {member.filename!r}",
                expected=f"at most {MAX_PICKLE_BYTES} bytes",
                found=f"{member.file_size}",
            )


def _plain_names(state: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    plain: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"model[{key!r}]", expected="a tensor", found=type(value).__name__)
        name = key.removeprefix(COMPILE_PREFIX)
        if name in plain:
            raise UnexpectedTensorError(f"tensor {name!r} is stored twice", found=f"with and without {COMPILE_PREFIX}")
        plain[name] = value
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
