"""TEST DOUBLE: an nGPT forward pass in NumPy float64, driven by NGPTSpec and Weights.

Not part of the product. It is the shortest honest statement of the network over the canonical tensors, so that
spec, rope frequencies and folding can be checked against golden data before any engine exists. ``faults`` makes
it wrong on purpose, for tests of the parity gate.
"""

from __future__ import annotations

import math

import numpy as np

from ngpt.rope import research_tables


def unit(x, eps=0.0):
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, length + eps, out=np.zeros_like(x), where=(length + eps) != 0)


def activation(name, u):
    if name == "relu2":
        return np.maximum(u, 0) ** 2
    if name == "relu":
        return np.maximum(u, 0)
    if name == "silu":
        return u / (1 + np.exp(-u))
    if name == "gelu":
        return u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2)))
    assert name == "gelu_tanh", name
    return 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


class Reference:
    """``logits, hidden = Reference(weights)(ids, positions, mask)``; hidden is [layers + 1, B, T, E].

    ``dtype`` is that of all arithmetic. ``replace(name, matrix)`` changes weights (quantisation); ``round_input``
    changes the input of every product with a weight (quantised activations).
    """

    def __init__(self, weights, faults=(), dtype=np.float64, replace=None, round_input=None):
        self.spec = weights.spec
        self.faults = frozenset(faults)
        self.dtype = dtype
        self.round_input = round_input or (lambda x: x)
        self.w = {}
        for name in weights.names():
            value = weights.get(name)
            if replace is not None and (name == "embed" or name.endswith(".weight")):
                value = replace(name, value)
            self.w[name] = value.astype(dtype)
        if "unsquared_sqk" in self.faults:
            for layer in range(self.spec.num_layers):
                name = f"layers.{layer}.attn.q_scale"
                self.w[name] = np.sqrt(self.w[name])
        if "signed_alpha" in self.faults:
            for layer in range(self.spec.num_layers):
                for part in ("attn", "mlp"):
                    raw = weights.checkpoint.get(f"model.layers.{layer}.{part}_alpha").numpy()
                    self.w[f"layers.{layer}.{part}.lr"] *= np.sign(raw).astype(dtype)

    def linear(self, name, x):
        y = self.round_input(x) @ self.w[name + ".weight"].T
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def encode(self, x, positions):
        """Position code on x [B, T, heads, D]."""
        spec = self.spec
        if spec.position == "research":
            s, c = (table[positions][:, :, None] for table in research_tables(spec.inv_freq, positions.max() + 1))
            out = np.empty_like(x)
            out[..., 0::2] = -x[..., 1::2] * c
            out[..., 1::2] = x[..., 0::2] * s
            return out
        angle = positions[:, :, None, None] * np.asarray(spec.inv_freq)
        cos, sin = ((f(angle) * spec.rope_attention_scaling).astype(self.dtype) for f in (np.cos, np.sin))
        half = spec.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    def attention(self, layer, h, positions, mask):
        spec, name = self.spec, f"layers.{layer}.attn."
        batch, length, _ = h.shape
        q, k, v = (self.linear(name + part, h).reshape(batch, length, -1, spec.head_dim) for part in "qkv")
        q = unit(self.encode(q, positions)) * self.w[name + "q_scale"].reshape(-1, spec.head_dim)
        k = unit(self.encode(k, positions))
        if "swapped_head" in self.faults and layer == 1:
            q = q[:, :, [1, 0, *range(2, spec.num_heads)]]
        group = spec.num_heads // spec.num_kv_heads
        k, v = (np.repeat(x, group, axis=2) for x in (k, v))
        out = self.attend(layer, q, k, v, mask)
        return self.linear(name + "o", out.reshape(batch, length, -1))

    def attend(self, layer, q, k, v, mask):
        """q, k, v [B, T, H, D] to [B, T, H, D]."""
        spec, length = self.spec, q.shape[1]
        scale = spec.head_dim ** (-0.5 if "inverse_scale" in self.faults else 0.5)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
        allowed = np.tril(np.ones((length, length), bool))[None, None] & mask[:, None, None, :]
        allowed = allowed | np.eye(length, dtype=bool)[None, None]  # a padded query may see itself: no NaN
        scores = np.where(allowed, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return np.einsum("bhqk,bkhd->bqhd", p, v)

    def mlp(self, layer, h):
        name = f"layers.{layer}.mlp."
        u = self.linear(name + "up", h)
        act = activation(self.spec.mlp, self.linear(name + "gate", h) if self.spec.gated else u)
        return self.linear(name + "down", u * act if self.spec.gated else act)

    def update(self, name, h, x, eps):
        lr = self.w[name + "lr"]
        return unit(h + lr * (unit(x, eps) - h))

    def __call__(self, ids, positions=None, mask=None, taps=None):
        ids = np.asarray(ids)
        mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask).astype(bool)
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if positions is None else positions
        taps = {} if taps is None else taps
        h = taps["embed"] = self.w["embed"][ids]
        hidden = [h]
        for layer in range(self.spec.num_layers):
            if "skipped_layer" in self.faults and layer == 1:
                hidden.append(h)
                continue
            name = f"layers.{layer}."
            h = self.update(name + "attn.", h, self.attention(layer, h, positions, mask), 0.0)
            taps[name + "attn.update"] = h
            h = self.update(name + "mlp.", h, self.mlp(layer, h), self.spec.mlp_eps)
            taps[name + "mlp.update"] = h
            hidden.append(h)
        return self.linear("head", h), np.stack(hidden)
