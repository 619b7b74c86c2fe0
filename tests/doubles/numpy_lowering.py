"""TEST DOUBLE: the vocabulary in NumPy float64, every coarse operation composed: what a lowering is, in its shortest form.

It states the network by `export.network.define_network`, as an exporter does; tests/doubles/reference.py is written on its own.
"""

from __future__ import annotations

import numpy as np

from export.lowerings.base import Lowering
from export.weights import position_diagonal, rope_tables
from tests.doubles.reference import activation, unit


class NumpyLowering(Lowering):
    """`define_network(NumpyLowering(weights, ids))` is the logits [B, S, V] of whole sequences ids [B, S].

    `taps` has every result by name.
    """

    def __init__(self, weights, ids):
        super().__init__(weights)
        self.ids, self.taps = np.asarray(ids), {}

    def _named(self, name, value):
        self.taps[name] = value
        return value

    def embedding(self, name):
        return self._named(name, self.weights.get("embed").astype(np.float64)[self.ids])

    def linear(self, name, x):
        bias = self.weights.get(f"{name}.bias") if self.weights.has(f"{name}.bias") else 0
        return self._named(name, x @ self.weights.get(f"{name}.weight").astype(np.float64).T + bias)

    def split_heads(self, name, x, heads):
        return self._named(name, x.reshape(*x.shape[:2], heads, self.spec.head_dim))

    def position(self, name, x):
        count = x.shape[1]
        if self.spec.position == "research":
            return self._named(name, x * position_diagonal(self.spec)[:count, None])
        cos, sin = (table[:count, None].astype(np.float64) for table in rope_tables(self.spec))
        half = self.spec.rotary_dim // 2
        a, b, rest = np.split(x, [half, 2 * half], axis=-1)
        return self._named(name, np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1))

    def l2norm(self, name, x, eps=0.0):
        return self._named(name, unit(x, eps))

    def vector(self, weight):
        return self.weights.get(weight).astype(np.float64)

    def head_vector(self, weight, heads):
        return self.vector(weight).reshape(heads, self.spec.head_dim)

    def add(self, name, x, y):
        return self._named(name, x + y)

    def sub(self, name, x, y):
        return self._named(name, x - y)

    def mul(self, name, x, y):
        return self._named(name, x * y)

    def activation(self, name, kind, x):
        return self._named(name, activation(kind, x))

    def attention(self, name, layer, q, k, v, scale):
        groups = q.shape[2] // k.shape[2]
        k, v = (np.repeat(x, groups, axis=2) for x in (k, v))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self._named(name, np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*q.shape[:2], -1))
