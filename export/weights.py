"""Canonical weights as a lowering asks for them: with what the deployment, not the checkpoint, folds in."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ngpt.rope import research_tables
from ngpt.spec import NGPTSpec
from ngpt.weights import Weights

Array = NDArray[np.float32]


class DeployedWeights:
    """`ngpt.weights.Weights` plus two exact foldings.

    The research position code is a signed swap within channel pairs and a diagonal: the swap goes into the rows of the q
    and k projections, the diagonal (`position_diagonal`) stays. In float16 `arithmetic` relu2's branch is scaled
    (`branch_scale`), and the eps of the norm that follows along with it (`mlp_eps`). `replace`, if given, maps (name,
    matrix) to the matrix used in its place (quantise and dequantise, say).
    """

    def __init__(
        self, weights: Weights, *, arithmetic: str = "float32", replace: Callable[[str, Array], Array] | None = None
    ) -> None:
        self.source = weights
        self.spec: NGPTSpec = weights.spec
        self._replace = replace
        self._branch = branch_scale(self.spec, arithmetic)
        self.mlp_eps = self.spec.mlp_eps * self._branch**2

    def names(self) -> tuple[str, ...]:
        """Canonical names in the order of the forward pass."""
        return self.source.names()

    def has(self, name: str) -> bool:
        """Whether this network has the tensor (biases are optional)."""
        return name in self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading."""
        return self.source.shape(name)

    def get(self, name: str) -> Array:
        """The tensor, float32. Reads, folds and returns a new array at each call."""
        value = self.source.get(name)
        if self.spec.position == "research" and ".attn." in name and name.split(".")[-2] in ("q", "k"):
            value = _signed_swap(value)
        if self._branch != 1.0:
            if ".mlp.up." in name:
                value = value * np.float32(self._branch)
            elif name.endswith("mlp.down.bias"):
                value = value * np.float32(self._branch**2)
        if self._replace is not None and name.endswith(".weight"):
            return self._replace(name, value)
        return value


def branch_scale(spec: NGPTSpec, arithmetic: str) -> float:
    """What the inputs of relu2 are scaled by: hidden_size**-1/4 in float16, whose range relu2 near sqrt(E) leaves; else 1.

    The output is scaled by the square, which the norm that follows takes away again up to its eps.
    """
    return spec.hidden_size**-0.25 if arithmetic == "float16" and spec.mlp == "relu2" and not spec.gated else 1.0


def _signed_swap(rows: Array) -> Array:
    """Row 2i becomes -(row 2i+1), row 2i+1 becomes row 2i."""
    out = np.empty_like(rows)
    out[0::2], out[1::2] = -rows[1::2], rows[0::2]
    return out


def rope_tables(spec: NGPTSpec) -> tuple[Array, Array]:
    """cos and sin, each float32 [max_length, rotary_dim / 2], computed in float64; yarn's factor is included."""
    angles = np.arange(spec.max_length, dtype=np.float64)[:, None] * np.asarray(spec.inv_freq)[None, :]
    scaling = spec.rope_attention_scaling
    return (np.cos(angles) * scaling).astype(np.float32), (np.sin(angles) * scaling).astype(np.float32)


def position_diagonal(spec: NGPTSpec) -> Array:
    """The research code's diagonal, float32 [max_length, D]: C at even, S at odd channels of its interleaved table."""
    sines, cosines = research_tables(spec.inv_freq, spec.max_length)
    diagonal: Array = np.stack((cosines, sines), axis=-1).reshape(spec.max_length, -1).astype(np.float32)
    return diagonal


def inverse_root(size: int) -> float:
    """1 / sqrt(size): rms_norm(x) * inverse_root(n) is x / ||x||."""
    return 1.0 / math.sqrt(size)
