"""TEST DOUBLE: an engine runner around the PyTorch model itself, with a real cache per slot.

It is the reference in float32 with another attention kernel, fed in chunks and token by token, so it must pass; each
name in ``FAULTS`` breaks it in one way that a real engine could be broken.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from ngpt.layers import hypersphere_update
from tests.doubles.torch_reference import TorchReference

FAULTS = ("inverse_scale", "swapped_head", "signed_alpha", "skipped_layer", "unsquared_sqk", "late_decode", "lost_chunk")


class TorchRunner:
    """``TorchRunner(folder, "inverse_scale")``; ``prepare(model)`` may change the model first (quantise it, say)."""

    def __init__(self, folder, *faults, num_slots=3, prepare=None):
        assert set(faults) <= set(FAULTS)
        self.faults, self.num_slots = frozenset(faults), num_slots
        self.model = TorchReference(folder, "float32", attention="sdpa").model
        config = self.model.config
        self.vocab_size, self.max_length = config.vocab_size, config.max_position_embeddings
        if prepare is not None:
            prepare(self.model)
        self.caches = {}
        with torch.no_grad():
            for index, layer in enumerate(self.model.model.layers):
                self._break(layer, index)
        if "skipped_layer" in self.faults:
            self.model.model.layers = self.model.model.layers[:-1]

    def _break(self, layer, index):
        attention = layer.self_attn
        size = attention.head_dim
        if "inverse_scale" in self.faults:
            attention.scaling = 1 / math.sqrt(size)
        if "swapped_head" in self.faults and index == 1:
            rows = attention.q_proj.weight
            rows[: 2 * size] = rows[: 2 * size].roll(size, dims=0)
        if "unsquared_sqk" in self.faults:
            scale = attention.sqk_scale
            attention.sqk.weight.copy_((attention.sqk.weight * scale).abs().sqrt() / scale)
        if "signed_alpha" in self.faults:
            layer.forward = lambda h, layer=layer, **options: _signed(layer, h, **options)

    def open(self):
        slot = min(set(range(self.num_slots)) - set(self.caches))
        self.caches[slot] = DynamicCache()
        return slot

    def close(self, slot):
        del self.caches[slot]

    def release(self):
        self.released = True

    def _run(self, slot, tokens, shift):
        if "lost_chunk" in self.faults and len(tokens) > 1:  # the second chunk of a prompt forgets the first
            self.caches[slot] = DynamicCache()
        cache = self.caches[slot]
        past = cache.get_seq_length()
        positions = torch.arange(past, past + len(tokens))[None] + shift
        ids = torch.as_tensor(np.asarray(tokens))[None]
        with torch.no_grad():
            output = self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return output.logits[0].float().numpy()

    def prefill(self, slot, tokens, *, all_logits=False):
        logits = self._run(slot, tokens, 0)
        return logits if all_logits else logits[-1]

    def decode(self, slots, tokens):
        shift = 1 if "late_decode" in self.faults else 0
        return np.stack([self._run(slot, [token], shift)[-1] for slot, token in zip(slots, tokens, strict=True)])


def _signed(layer, h, **options):
    """The layer's forward pass without the absolute value of its step sizes."""
    x, _ = layer.self_attn(h, **options)
    h = hypersphere_update(h, x, layer.attn_alpha * layer.attn_alpha_scale)
    return hypersphere_update(h, layer.mlp(h), layer.mlp_alpha * layer.mlp_alpha_scale, layer.mlp_norm_eps)
