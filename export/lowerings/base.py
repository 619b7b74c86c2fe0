"""The vocabulary in which the network is stated, at two grains.

Fine operations are what every runtime must spell. Coarse ones (`queries_keys_values`, `qk_norm`, `hypersphere_update`) are
composed of fine ones here; a lowering overrides a coarse one exactly where its runtime has a fused form for it. The
composed form stays: a test runs it whole in every lowering.
`T` is the runtime's handle of a tensor. B batch, S new tokens, E hidden, H query heads, K key heads, D head channels.

Heads are an axis. `split_heads` makes it, and q, k and v have it until `attention`: [B, S, heads, D]. A runtime may
hold the axes in another order (TensorRT: heads before tokens), or B and S as one axis (TensorRT-LLM: packed tokens);
nothing outside of the lowering sees it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from export.weights import DeployedWeights

T = TypeVar("T")


class Lowering(ABC, Generic[T]):
    """What a runtime implements. `name` is the name of the result; weights are named as in `ngpt.weights`.

    `layers` are those this lowering states: all of them, or one stage of a pipeline, whose `embedding` is then what the stage
    before sends and whose `linear("head")` sends to the stage after.
    """

    def __init__(self, weights: DeployedWeights) -> None:
        self.weights = weights
        self.spec = weights.spec

    @property
    def layers(self) -> Sequence[int]:
        """The layers to state."""
        return range(self.spec.num_layers)

    @property
    def mlp_eps(self) -> float:
        """eps of the norm of the MLP's branch."""
        return self.weights.mlp_eps

    @abstractmethod
    def embedding(self, name: str) -> T:
        """Rows of the embedding table for the input ids: [B, S, E]."""

    @abstractmethod
    def linear(self, name: str, x: T) -> T:
        """x @ W.T (+ b) with `{name}.weight` [out, in] and, where the network has it, `{name}.bias` [out]."""

    @abstractmethod
    def split_heads(self, name: str, x: T, heads: int) -> T:
        """x [B, S, heads * D] with heads as an axis: [B, S, heads, D]."""

    @abstractmethod
    def position(self, name: str, x: T) -> T:
        """The position code of each head of x [B, S, heads, D]."""

    @abstractmethod
    def l2norm(self, name: str, x: T, eps: float = 0.0) -> T:
        """x / (||x|| + eps) over the last axis, hidden states or heads; a zero row gives zeros."""

    @abstractmethod
    def vector(self, weight: str) -> T:
        """A weight vector [E] as an operand of [B, S, E]."""

    @abstractmethod
    def head_vector(self, weight: str, heads: int) -> T:
        """A weight vector [heads * D] as an operand of [B, S, heads, D]."""

    @abstractmethod
    def add(self, name: str, x: T, y: T) -> T:
        """x + y, broadcasting."""

    @abstractmethod
    def sub(self, name: str, x: T, y: T) -> T:
        """x - y, broadcasting."""

    @abstractmethod
    def mul(self, name: str, x: T, y: T) -> T:
        """x * y, broadcasting."""

    @abstractmethod
    def activation(self, name: str, kind: str, x: T) -> T:
        """relu2, relu, silu, gelu or gelu_tanh, elementwise. Raises UnsupportedError for another `kind`."""

    @abstractmethod
    def attention(self, name: str, layer: int, q: T, k: T, v: T, scale: float) -> T:
        """softmax(scale * q k^T + causal mask) v over the cache of `layer`, which k and v are appended to.

        q [B, S, H, D], k and v [B, S, K, D] -> [B, S, H * D], the heads side by side as `linear` takes them.
        """

    def qk_norm(self, name: str, q: T, k: T) -> tuple[T, T]:
        """Position code, l2 norm of each head, then sqk**2 on q alone. The order matters: sqk does not commute with the code."""
        q = self.l2norm(f"{name}.q_norm", self.position(f"{name}.q_rope", q))
        k = self.l2norm(f"{name}.k_norm", self.position(f"{name}.k_rope", k))
        return self.mul(f"{name}.q_scaled", q, self.head_vector(f"{name}.q_scale", self.spec.num_heads)), k

    def queries_keys_values(self, name: str, h: T) -> tuple[T, T, T]:
        """h [B, S, E] -> q [B, S, H, D], k and v [B, S, K, D], ready for `attention`."""
        heads = {"q": self.spec.num_heads, "k": self.spec.num_kv_heads, "v": self.spec.num_kv_heads}
        q, k, v = (self.split_heads(f"{name}.{part}_heads", self.linear(f"{name}.{part}", h), n) for part, n in heads.items())
        return *self.qk_norm(name, q, k), v

    def hypersphere_update(self, name: str, h: T, x: T, rate: str, eps: float) -> T:
        """norm(h + rate * (norm(x, eps) - h)) (paper eq. 10 and 11)."""
        step = self.sub(f"{name}.step", self.l2norm(f"{name}.unit", x, eps), h)
        moved = self.add(f"{name}.moved", h, self.mul(f"{name}.scaled", self.vector(rate), step))
        return self.l2norm(name, moved)
