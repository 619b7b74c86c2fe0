"""The deployed nGPT network, stated once (arXiv:2410.01131, section 2), over the vocabulary of `lowerings.base.Lowering`.

Whoever owns a runtime's graph calls `define_network` with that runtime's lowering. Names are shared by every lowering
and by the PyTorch model's taps, so that two runs are compared by joining on names.
"""

import math
from typing import TypeVar

from export.lowerings.base import Lowering

T = TypeVar("T")


def define_network(ops: Lowering[T]) -> T:
    """State the network to a lowering; returns its handle of the logits [B, S, V]."""
    spec = ops.spec
    h = ops.embedding("embed")
    for layer in ops.layers:
        attn, mlp = f"layers.{layer}.attn", f"layers.{layer}.mlp"
        q, k, v = ops.queries_keys_values(attn, h)
        # The dot product of two unit vectors has variance 1/D, so the softmax scale is sqrt(D) and multiplies.
        a = ops.attention(f"{attn}.out", layer, q, k, v, scale=math.sqrt(spec.head_dim))
        x = ops.linear(f"{attn}.o", a)
        h = ops.hypersphere_update(f"{attn}.update", h, x, rate=f"{attn}.lr", eps=0.0)
        u = ops.linear(f"{mlp}.up", h)
        if spec.gated:
            gate = ops.activation(f"{mlp}.gate_act", spec.mlp, ops.linear(f"{mlp}.gate", h))
            u = ops.mul(f"{mlp}.act", u, gate)
        else:
            u = ops.activation(f"{mlp}.act", spec.mlp, u)
        x = ops.linear(f"{mlp}.down", u)
        h = ops.hypersphere_update(f"{mlp}.update", h, x, rate=f"{mlp}.lr", eps=ops.mlp_eps)
    return ops.linear("head", h)
