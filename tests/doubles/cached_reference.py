"""TEST DOUBLE: tests/doubles/reference.py's network over an engine's inputs, with the cache in the arrays it is given.

Every input counts on its own: positions come from position_ids alone, what may be attended to from lengths alone,
where keys and values go from write_at alone, and which logits are wanted from logit_rows alone. What lies in the
cache past a row's length is multiplied by zero, so that NaN there shows.
"""

from __future__ import annotations

import numpy as np

from tests.doubles.reference import Reference, unit


class CachedReference(Reference):
    """``outputs = CachedReference(weights).evaluate(feeds)``; the cache's arrays may have any floating type."""

    def evaluate(self, feeds):
        self.step = feeds
        self.outputs = {}
        batch, count = feeds["input_ids"].shape
        assert (feeds["input_ids"] >= 0).all() and (feeds["write_at"] + count <= feeds["past_key_values.0.key"].shape[2]).all()
        logits, _ = self(feeds["input_ids"], feeds["position_ids"])
        logits = logits.reshape(batch * count, -1)[feeds["logit_rows"]]
        return self.outputs | {"logits": logits.astype(np.float32)}

    def attention(self, layer, h, positions, mask):
        spec, name, feeds = self.spec, f"layers.{layer}.attn.", self.step
        batch, count, _ = h.shape
        q, k, v = (self.linear(name + part, h).reshape(batch, count, -1, spec.head_dim) for part in "qkv")
        q = unit(self.encode(q, positions)) * self.w[name + "q_scale"].reshape(-1, spec.head_dim)
        k = unit(self.encode(k, positions))
        past = {}
        for kind, new in (("key", k), ("value", v)):
            cache = feeds[f"past_key_values.{layer}.{kind}"].copy()
            for row, at in enumerate(feeds["write_at"]):
                cache[row, :, at : at + count] = new[row].swapaxes(0, 1)
            self.outputs[f"present.{layer}.{kind}"] = cache
            past[kind] = np.repeat(cache.astype(self.dtype), spec.num_heads // spec.num_kv_heads, axis=1)
        scores = np.einsum("bshd,bhtd->bhst", q, past["key"]) * spec.head_dim**0.5
        last = feeds["lengths"][:, None] - count + np.arange(count)  # the last position each query may see
        allowed = np.arange(scores.shape[-1]) <= last[:, None, :, None]
        scores = np.where(allowed, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return self.linear(name + "o", np.einsum("bhst,bhtd->bshd", p, past["value"]).reshape(batch, count, -1))
