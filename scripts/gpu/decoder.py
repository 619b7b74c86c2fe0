"""A bare nGPT decoder over folded weights, for timing: static cache, one position, norms that can be exchanged.

It follows export/network.py (relu2, no biases, rotary positions) and is tested against the golden logits on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from scripts.gpu.norms import Norms

MLP_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """The 8B model's by default."""

    vocab: int = 131072
    hidden: int = 4096
    inner: int = 21504
    layers: int = 32
    heads: int = 32
    keys: int = 8
    channels: int = 128


@dataclass
class Layer:
    """Matrices [out, in] of the storage type; lr [E] and q_scale [H * D] float32; suv and sqrt(E) are folded into `up`."""

    qk: Tensor
    v: Tensor
    o: Tensor
    up: Tensor
    down: Tensor
    attn_lr: Tensor
    mlp_lr: Tensor
    q_scale: Tensor


@dataclass
class Weights:
    """embed and head [V, E] (sz folded), cos and sin float32 [L, R / 2]."""

    embed: Tensor
    head: Tensor
    layers: list[Layer]
    cos: Tensor
    sin: Tensor

    def bytes_read_per_step(self) -> int:
        """Everything but the embedding table, of which a step reads one row a sequence."""
        tensors: list[Tensor] = [self.head, *(tensor for layer in self.layers for tensor in vars(layer).values())]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def random_weights(shape: Shape, length: int, dtype: torch.dtype, device: str) -> Weights:
    """Rows of unit norm and scales at their initial values, as a fresh model has them."""

    def matrix(rows: int, columns: int) -> Tensor:
        return functional.normalize(torch.randn(rows, columns, device=device, dtype=dtype), dim=1)

    def layer() -> Layer:
        queries, keys = shape.heads * shape.channels, shape.keys * shape.channels
        up = matrix(shape.inner, shape.hidden) * math.sqrt(shape.hidden)
        lr = torch.full((shape.hidden,), 0.05, device=device)
        scale = torch.ones(queries, device=device)
        e = shape.hidden
        return Layer(matrix(queries + keys, e), matrix(keys, e), matrix(e, queries), up, matrix(e, shape.inner), lr, lr, scale)

    angles = torch.arange(length)[:, None] * 1e6 ** (-torch.arange(0, shape.channels, 2) / shape.channels)
    layers = [layer() for _ in range(shape.layers)]
    embed, head = matrix(shape.vocab, shape.hidden), matrix(shape.vocab, shape.hidden)
    return Weights(embed, head, layers, angles.cos().to(device), angles.sin().to(device))


class Decoder:
    """`prefill(ids [B, T])` fills the cache from position 0; `decode(ids [B, 1])` computes the last position of the cache.

    `step` computes one layer and may be replaced by a compiled form of itself.
    """

    def __init__(self, shape: Shape, weights: Weights, norms: Norms, batch: int, length: int) -> None:
        self.shape, self.weights, self.norms, self.length = shape, weights, norms, length
        self.step: Callable[..., Tensor] = self._layer
        size = (batch, shape.keys, length, shape.channels)
        self.cache = [(weights.embed.new_zeros(size), weights.embed.new_zeros(size)) for _ in weights.layers]
        positions = torch.arange(length, device=weights.embed.device, dtype=torch.int32)
        self._positions = positions.expand(batch, length).contiguous()
        self._last = self._positions[:, -1:].contiguous()

    def bytes_read_per_step(self) -> int:
        """Weights and the whole cache: what a decoding step cannot avoid to read."""
        return self.weights.bytes_read_per_step() + sum(t.numel() * t.itemsize for pair in self.cache for t in pair)

    def prefill(self, ids: Tensor, *, all_logits: bool = False) -> Tensor:
        """Logits [B, V] of the last token, or [B, T, V]."""
        h = self._stack(ids, self._positions[:, : ids.shape[1]].contiguous(), 0)
        return functional.linear(h if all_logits else h[:, -1], self.weights.head)

    def decode(self, ids: Tensor) -> Tensor:
        """Logits [B, V] of one token at the last position; every call writes the same position anew."""
        return functional.linear(self._stack(ids, self._last, self.length - 1)[:, -1], self.weights.head)

    def _stack(self, ids: Tensor, positions: Tensor, start: int) -> Tensor:
        h = functional.embedding(ids, self.weights.embed)
        for layer, (keys, values) in zip(self.weights.layers, self.cache, strict=True):
            h = self.step(h, positions, keys, values, start, *vars(layer).values())
        return h

    def _layer(
        self,
        h: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        start: int,
        qk: Tensor,
        v: Tensor,
        o: Tensor,
        up: Tensor,
        down: Tensor,
        attn_lr: Tensor,
        mlp_lr: Tensor,
        q_scale: Tensor,
    ) -> Tensor:
        """One layer over plain tensors: all layers then share what is compiled for the first."""
        shape, norms = self.shape, self.norms
        batch, tokens, _ = h.shape
        q, k = norms.qk(functional.linear(h, qk), self.weights.cos, self.weights.sin, positions, q_scale, shape.heads)
        end = start + tokens
        keys[:, :, start:end] = k
        values[:, :, start:end] = functional.linear(h, v).view(batch, tokens, shape.keys, shape.channels).transpose(1, 2)
        a = functional.scaled_dot_product_attention(
            q, keys[:, :, :end], values[:, :, :end], is_causal=tokens > 1, scale=math.sqrt(shape.channels), enable_gqa=True
        )
        h = norms.update(h, functional.linear(a.transpose(1, 2).reshape(batch, tokens, -1), o), attn_lr, 0.0)
        x = functional.linear(functional.relu(functional.linear(h, up)).square(), down)
        return norms.update(h, x, mlp_lr, MLP_EPS)
