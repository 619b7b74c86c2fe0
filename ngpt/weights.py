"""`Weights`: the canonical tensors of the deployed network, folded lazily from a checkpoint.

Scales that fold exactly are folded here, once, in float64 and rounded to float32 at the end: suv * sqrt(E) into
the rows (and bias) of the MLP's up and gate projections, sz into the rows of the head. sqk enters squared on q
after the position code, so it stays a vector; the alphas become learning rates by absolute value after scaling.

    embed                        [V, E]
    layers.{i}.attn.q.weight     [H*D, E]     .k, .v [K*D, E]     .o [E, H*D]     (+ .bias [out])
    layers.{i}.attn.q_scale      [H*D]        (sqk * sqk_scale)**2, multiplies the normalised q
    layers.{i}.attn.lr           [E]
    layers.{i}.mlp.up.weight     [F, E]       (+ .bias)     suv * suv_scale * sqrt(E) folded in
    layers.{i}.mlp.gate.weight   [F, E]       (+ .bias)     gated networks only, likewise
    layers.{i}.mlp.down.weight   [E, F]       (+ .bias)
    layers.{i}.mlp.lr            [E]
    head.weight                  [V, E]       sz * sz_scale folded in, here or in the file; from the table when tied
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from numpy.typing import NDArray

from ngpt.checkpoint import Checkpoint
from ngpt.errors import MissingTensorError

_BLOCK = 1 << 21  # float64 elements in flight while folding
_LAYER = re.compile(r"layers\.(0|[1-9]\d*)\.(attn|mlp)\.([a-z_]+)(?:\.(weight|bias))?")


class Weights:
    """Canonical tensors by name. Nothing is kept: each `get` reads, folds and returns a new array."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self._shapes = _shapes(checkpoint)

    def names(self) -> tuple[str, ...]:
        """All canonical names, in the order of the forward pass."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading. Raises `MissingTensorError` for an unknown name."""
        if name not in self._shapes:
            raise MissingTensorError(f"this network has no tensor {name!r}", remedy="see Weights.names()")
        return self._shapes[name]

    def get(self, name: str) -> NDArray[np.float32]:
        """The tensor, float32, C-contiguous. Raises `MissingTensorError` for an unknown name."""
        self.shape(name)
        spec = self.spec
        if name == "embed":
            return self._plain("model.embed_tokens.weight")
        if name == "head.weight" and spec.sz_folded:
            return self._plain("lm_head.weight")
        if name == "head.weight":
            source = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
            return self._scaled(source, self._vector("sz.weight") * spec.sz_scale)
        match = _LAYER.fullmatch(name)
        if match is None:
            raise AssertionError(name)  # names come from _shapes alone
        layer, part, tensor, kind = match.groups()
        prefix = f"model.layers.{layer}."
        if part == "attn":
            return self._attention(prefix, tensor, kind)
        return self._mlp(prefix, tensor, kind)

    def _attention(self, prefix: str, tensor: str, kind: str | None) -> NDArray[np.float32]:
        if tensor == "lr":
            return _float32(np.abs(self._vector(prefix + "attn_alpha") * self.spec.attn_alpha_scale))
        if tensor == "q_scale":
            return _float32((self._vector(prefix + "self_attn.sqk.weight") * self.spec.sqk_scale) ** 2)
        return self._plain(f"{prefix}self_attn.{tensor}_proj.{kind}")

    def _mlp(self, prefix: str, tensor: str, kind: str | None) -> NDArray[np.float32]:
        spec = self.spec
        if tensor == "lr":
            return _float32(np.abs(self._vector(prefix + "mlp_alpha") * spec.mlp_alpha_scale))
        source = f"{prefix}mlp.{tensor}_proj.{kind}"
        if tensor == "down":
            return self._plain(source)
        suv = self._vector(prefix + "mlp.suv.weight")
        half = suv[: spec.intermediate_size] if tensor == "up" else suv[spec.intermediate_size :]
        return self._scaled(source, half * (spec.suv_scale * math.sqrt(spec.hidden_size)))

    def _vector(self, name: str) -> NDArray[np.float64]:
        vector: NDArray[np.float64] = self.checkpoint.get(name).double().reshape(-1).numpy()
        return vector

    def _plain(self, name: str) -> NDArray[np.float32]:
        # Memory of its own, so that the caller may outlive the memory map and write; widening has made it already.
        tensor = self.checkpoint.get(name)
        if tensor.dtype == torch.float32:
            tensor = tensor.clone()
        array: NDArray[np.float32] = np.ascontiguousarray(tensor.float().numpy())
        return array

    def _scaled(self, name: str, rows: NDArray[np.float64]) -> NDArray[np.float32]:
        """rows[:, None] * tensor, folded in float64 a block of rows at a time."""
        tensor = self.checkpoint.get(name)
        out = np.empty(tuple(tensor.shape), dtype=np.float32)
        step = max(1, _BLOCK // max(1, math.prod(tensor.shape[1:])))
        for start in range(0, len(rows), step):
            block: NDArray[np.float64] = tensor[start : start + step].to(torch.float64).numpy()
            scale = rows[start : start + step].reshape(-1, *[1] * (block.ndim - 1))
            out[start : start + step] = block * scale
        return out


def _float32(array: NDArray[np.float64]) -> NDArray[np.float32]:
    return array.astype(np.float32)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    spec = checkpoint.spec
    e, f, v = spec.hidden_size, spec.intermediate_size, spec.vocab_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (v, e)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        shapes[name + ".weight"] = (rows, columns)
        if bias:
            shapes[name + ".bias"] = (rows,)

    for layer in range(spec.num_layers):
        attn, mlp = f"layers.{layer}.attn.", f"layers.{layer}.mlp."
        linear(attn + "q", q, e, spec.attention_bias)
        linear(attn + "k", kv, e, spec.attention_bias)
        linear(attn + "v", kv, e, spec.attention_bias)
        shapes[attn + "q_scale"] = (q,)
        linear(attn + "o", e, q, spec.attention_bias)
        shapes[attn + "lr"] = (e,)
        linear(mlp + "up", f, e, spec.mlp_bias)
        if spec.gated:
            linear(mlp + "gate", f, e, spec.mlp_bias)
        linear(mlp + "down", e, f, spec.mlp_bias)
        shapes[mlp + "lr"] = (e,)
    shapes["head.weight"] = (v, e)
    return shapes
