"""Faults of weights: what is wrong with a tensor when the engine gets it. Each is a function (weights, name, value) -> value."""

import math

import numpy as np

from export.weights import DeployedWeights
from ngpt.weights import Weights

LAYER = 1
"""Where a fault of one layer is made: not the first, so that naming the first would be wrong."""


class FaultyWeights(DeployedWeights):
    """A checkpoint's weights with a change; `spec` changes what the lowering believes of the model."""

    def __init__(self, checkpoint, arithmetic, change=None, spec=None):
        super().__init__(Weights(checkpoint), arithmetic=arithmetic)
        self._change = change
        if spec is not None:
            self.spec = spec(self.spec)

    def get(self, name):
        value = super().get(name)
        return value if self._change is None else np.ascontiguousarray(self._change(self, name, value), np.float32)

    def right(self, name):
        """The tensor without the fault."""
        return super().get(name)

    def stored(self, name):
        """A vector as the checkpoint has it."""
        return self.source.checkpoint.get(name).double().reshape(-1).numpy()


def sqk_not_squared(weights, name, value):
    if not name.endswith("attn.q_scale"):
        return value
    return weights.stored(f"model.layers.{name.split('.')[1]}.self_attn.sqk.weight") * weights.spec.sqk_scale


def alpha_signed(weights, name, value):
    if not name.endswith(".lr"):
        return value
    _, layer, part, _ = name.split(".")
    return weights.stored(f"model.layers.{layer}.{part}_alpha") * getattr(weights.spec, f"{part}_alpha_scale")


def alpha_unscaled(weights, name, value):
    if not name.endswith(".lr"):
        return value
    return value / getattr(weights.spec, f"{name.split('.')[2]}_alpha_scale")


def no_root(weights, name, value):
    """suv without sqrt(E)."""
    return value / math.sqrt(weights.spec.hidden_size) if ".mlp.up." in name or ".mlp.gate." in name else value


def suv_after_activation(weights, name, value):
    """suv multiplies what leaves the activation: the columns of `down` instead of the rows of `up`."""
    if ".mlp.up." not in name and not name.endswith("mlp.down.weight"):
        return value
    suv = weights.stored(f"model.layers.{name.split('.')[1]}.mlp.suv.weight") * weights.spec.suv_scale
    return value * suv[None] if ".down." in name else value / suv.reshape(-1, *[1] * (value.ndim - 1))


def sz_unscaled(weights, name, value):
    return value / weights.spec.sz_scale if name == "head.weight" else value


def sz_missing(weights, name, value):
    if name != "head.weight":
        return value
    return value / (weights.stored("sz.weight") * weights.spec.sz_scale)[:, None]


def layers_swapped(weights, name, value):
    """The weights of two layers change places."""
    other = {f"layers.{LAYER}.": f"layers.{LAYER + 1}.", f"layers.{LAYER + 1}.": f"layers.{LAYER}."}
    for one, two in other.items():
        if name.startswith(one):
            return weights.right(two + name.removeprefix(one))
    return value


def layer_skipped(weights, name, value):
    return value * 0 if name.startswith(f"layers.{LAYER}.") and name.endswith(".lr") else value


def head_zeroed(weights, name, value):
    """One attention head of one layer adds nothing."""
    if name == f"layers.{LAYER}.attn.o.weight":
        size = weights.spec.head_dim
        value[:, 2 * size : 3 * size] = 0
    return value


def vocabulary_rows_exchanged(weights, name, value):
    if name == "head.weight":
        value[[10, 11]] = value[[11, 10]]
    return value


def keys_tiled(weights, name, value):
    """Query head h uses key head h mod K, as with keys that are tiled, instead of h div (H / K), as with keys repeated."""
    spec = weights.spec
    order = np.arange(spec.num_heads).reshape(-1, spec.num_kv_heads).T.reshape(-1)
    part = name.partition(".attn.")[2]
    if part in ("q.weight", "q.bias", "q_scale"):
        return value.reshape(spec.num_heads, spec.head_dim, -1)[order].reshape(value.shape)
    if part == "o.weight":
        return value.reshape(len(value), spec.num_heads, spec.head_dim)[:, order].reshape(value.shape)
    return value


def keys_and_values_exchanged(weights, name, value):
    for one, two in (("k", "v"), ("v", "k")):
        if name.startswith(f"layers.{LAYER}.attn.{one}."):
            return weights.right(name.replace(f".{one}.", f".{two}."))
    return value


def embedding_scaled(weights, name, value):
    """As some architectures do: times sqrt(E)."""
    return value * math.sqrt(weights.spec.hidden_size) if name == "embed" else value


def embedding_shifted(weights, name, value):
    return np.roll(value, 1, axis=0) if name == "embed" else value


def head_tied(weights, name, value):
    """The head is the embedding table, with its scales, in a checkpoint that is not tied."""
    if name != "head.weight":
        return value
    return weights.right("embed") * (weights.stored("sz.weight") * weights.spec.sz_scale)[:, None]


def bias_dropped(weights, name, value):
    return value * 0 if name == f"layers.{LAYER}.attn.o.bias" else value


def matrix_transposed(weights, name, value):
    return value.T if name == f"layers.{LAYER}.attn.o.weight" else value


def matrix_negated(weights, name, value):
    return -value if name == f"layers.{LAYER}.mlp.down.weight" else value


def sign_of_one_weight(weights, name, value):
    if name == f"layers.{LAYER}.mlp.up.weight":
        where = np.unravel_index(np.abs(value).argmax(), value.shape)
        value[where] *= -1
    return value
