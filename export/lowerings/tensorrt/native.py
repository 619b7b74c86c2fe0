"""The network in TensorRT (tensorrt 10 and 11, tensorrt_rtx), strongly typed.

Layers and tensors carry the network's own names. Inputs, all int32: input_ids, position_ids [B, S]; write_at [B], where the new
keys go in each row's cache; lengths [B], a row's keys after this step; logit_rows [R], which of the B * S tokens get logits.
Caches past_key_values.{i}.key / .value [B, K, L, D]. Outputs: logits float32 [R, V] and present.{i}.key / .value, the same
memory as the caches where the library has its cache-update layer, else a second buffer of the same shape.
Tensors by head are [B, heads, S, D], as the library's rotary, cache and attention layers take them.
Norms, rotations and updates are float32; what is stored between products has the precision's type.
TensorRT-RTX 1.7.1 builds these networks in the tests; no engine has been executed on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.lowerings.tensorrt import older_versions
from export.lowerings.tensorrt.layers import TensorRTLayers
from export.lowerings.tensorrt.library import Network, Tensor
from export.weights import position_diagonal, rope_tables
from ngpt.errors import UnsupportedError


class TensorRT(TensorRTLayers):
    """Native layers only: what every library has, and what TensorRT-RTX, which takes no plugins, needs."""

    def prepare(self) -> None:
        spec = self.spec
        self.input_ids = self.input("input_ids", self.int32, (-1, -1))
        self.position_ids = self.input("position_ids", self.int32, (-1, -1))
        self.write_at = self.input("write_at", self.int32, (-1,))
        self.lengths = self.input("lengths", self.int32, (-1,))
        self.logit_rows = self.input("logit_rows", self.int32, (-1,))
        cache = (-1, spec.num_kv_heads, spec.max_length, spec.head_dim)
        for layer in range(spec.num_layers):
            for kind in ("key", "value"):
                self.input(f"past_key_values.{layer}.{kind}", self.stored, cache)
        self._mask = self._causal_mask()

    def finish(self, logits: Tensor, taps: Sequence[str] = ()) -> Network:
        """Mark the outputs: `logits` [R, V], the caches, and the tensors that `taps` names. Returns the network."""
        logits = self.cast("logits", logits, self.float32, always=True)
        self.network.mark_output(logits)
        for layer in range(self.spec.num_layers):
            for kind in ("key", "value"):
                self.network.mark_output(self.values[f"present.{layer}.{kind}"])
        for name in taps:
            self.network.mark_output(self.cast(f"{name}.tap", self.values[name], self.float32, always=True))
        self.library.check("the network's outputs")
        return self.network

    # -- the vocabulary ------------------------------------------------------------------------------------------------

    def embedding(self, name: str) -> Tensor:
        table = self.weight("embed.table", lambda: self.weights.get("embed"), self.weights.shape("embed"))
        return self.out(name, self.network.add_gather(table, self.input_ids, 0))

    def linear(self, name: str, x: Tensor) -> Tensor:
        if name == "head":  # only the tokens whose logits somebody wants
            flat = self.reshape(f"{name}.tokens", x, (-1, self.spec.hidden_size))
            x = self.out(f"{name}.rows", self.network.add_gather(flat, self.logit_rows, 0))
        return self.matmul(name, x, [name])

    def split_heads(self, name: str, x: Tensor, heads: int) -> Tensor:
        return self.reshape(name, x, (0, 0, heads, self.spec.head_dim), (0, 2, 1, 3))

    def position(self, name: str, x: Tensor) -> Tensor:
        if self.spec.position == "research":
            table = self.constant("position.table", position_diagonal(self.spec))
            return self.mul(name, x, self._by_position("position.diagonal", table))
        cos, sin = (self.constant(f"rope.{n}", t) for n, t in zip(("cos", "sin"), rope_tables(self.spec), strict=True))
        if not self.library.has_rotary:
            cos, sin = self._by_position("rope.cos.rows", cos), self._by_position("rope.sin.rows", sin)
            return older_versions.rotate(self, name, x, cos, sin)
        layer = self.network.add_rotary_embedding(self.wide(f"{name}.wide", x), cos, sin, False, self.spec.rotary_dim)
        self.made(name, layer).set_input(3, self.position_ids)
        return self.out(name, layer)

    def _by_position(self, name: str, table: Tensor) -> Tensor:
        """Rows of a table [L, width] at each token's position: [B, 1, S, width]; the same for all layers."""
        if name not in self.values:
            rows = self.out(f"{name}.gathered", self.network.add_gather(table, self.position_ids, 0))
            self.reshape(name, rows, (0, 1, -1, int(table.shape[1])))
        return self.values[name]

    def l2norm(self, name: str, x: Tensor, eps: float = 0.0) -> Tensor:
        x = self.wide(f"{name}.wide", x)
        last = 1 << (len(x.shape) - 1)
        squares = self.mul(f"{name}.squares", x, x)
        total = self.out(f"{name}.total", self.network.add_reduce(squares, self.trt.ReduceOperation.SUM, last, True))
        length = self.out(f"{name}.length", self.network.add_unary(total, self.trt.UnaryOperation.SQRT))
        # A zero row gives zeros: dividing by the smallest normal number instead of by zero.
        guard = eps if eps else float(np.finfo(np.float32).tiny)
        operation = self.trt.ElementWiseOperation.SUM if eps else self.trt.ElementWiseOperation.MAX
        guard_value = self.scalar(f"{name}.guard", guard, len(x.shape))
        length = self.binary(f"{name}.guarded", length, guard_value, operation)
        return self.binary(name, x, length, self.trt.ElementWiseOperation.DIV)

    def vector(self, weight: str) -> Tensor:
        return self.constant(weight, self.weights.get(weight)[None, None])

    def head_vector(self, weight: str, heads: int) -> Tensor:
        return self.constant(weight, self.weights.get(weight).reshape(1, heads, 1, self.spec.head_dim))

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.binary(name, x, y, self.trt.ElementWiseOperation.SUM)

    def sub(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.binary(name, x, y, self.trt.ElementWiseOperation.SUB)

    def mul(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.binary(name, x, y, self.trt.ElementWiseOperation.PROD)

    def activation(self, name: str, kind: str, x: Tensor) -> Tensor:
        types = self.trt.ActivationType
        if kind == "silu":
            return self.mul(name, x, self.out(f"{name}.sigmoid", self.network.add_activation(x, types.SIGMOID)))
        if kind in ("gelu", "gelu_tanh"):
            which = types.GELU_TANH if kind == "gelu_tanh" else types.GELU_ERF
            return self.out(name, self.network.add_activation(x, which))
        if kind == "relu":
            return self.out(name, self.network.add_activation(x, types.RELU))
        if kind != "relu2":
            raise UnsupportedError("activation in TensorRT", expected="relu2, relu, silu, gelu, gelu_tanh", found=kind)
        positive = self.out(f"{name}.relu", self.network.add_activation(x, types.RELU))
        return self.mul(name, positive, positive)

    def queries_keys_values(self, name: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One product for all three; q and k are encoded and normed together."""
        heads, keys, size = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        packed = self.matmul(f"{name}.qkv", h, [f"{name}.{part}" for part in "qkv"])
        by_head = self.split_heads(f"{name}.qkv_heads", packed, heads + 2 * keys)
        qk = self.heads(f"{name}.qk", by_head, 0, heads + keys)
        v = self.heads(f"{name}.v", by_head, heads + keys, keys)
        unit = self.l2norm(f"{name}.qk_norm", self.position(f"{name}.qk_rope", qk))
        on_q = self.weights.get(f"{name}.q_scale").reshape(heads, size)
        scale = self.constant(f"{name}.qk_scale", np.concatenate((on_q, np.ones((keys, size), np.float32)))[None, :, None])
        scaled = self.mul(f"{name}.qk_scaled", unit, scale)
        return self.heads(f"{name}.q_scaled", scaled, 0, heads), self.heads(f"{name}.k_norm", scaled, heads, keys), v

    def hypersphere_update(self, name: str, h: Tensor, x: Tensor, rate: str, eps: float) -> Tensor:
        # Composed in float32; only its result is stored.
        wide = super().hypersphere_update(f"{name}.f32", self.wide(f"{name}.h", h), x, rate, eps)
        return self.cast(name, wide, self.stored, always=True)

    def attention(self, name: str, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # IAttention has no scale of its own.
        q = self.narrow(f"{name}.queries", self.mul(f"{name}.queries_wide", q, self.scalar(f"{name}.scale", scale, 4)))
        keys = self._append(f"present.{layer}.key", self.values[f"past_key_values.{layer}.key"], k)
        values = self._append(f"present.{layer}.value", self.values[f"past_key_values.{layer}.value"], v)
        out = self._attend(f"{name}.heads", q, keys, values)
        width = self.spec.num_heads * self.spec.head_dim
        return self.reshape(name, out, (0, 0, width), first=(0, 2, 1, 3))

    # -- attention -----------------------------------------------------------------------------------------------------

    def _causal_mask(self) -> Tensor:
        """Whether a query may see a key: bool [B, 1, S, L]. Keys lie in the cache at their positions: the order says it."""
        length = self.spec.max_length
        keys = self.constant("mask.keys", np.arange(length, dtype=np.int32)[None, None, None])
        rows = self.reshape("mask.queries", self.position_ids, (0, 1, -1, 1))
        later = self.out("mask.later", self.network.add_elementwise(keys, rows, self.trt.ElementWiseOperation.GREATER))
        return self.out("mask", self.network.add_unary(later, self.trt.UnaryOperation.NOT))

    def _append(self, name: str, past: Tensor, new: Tensor) -> Tensor:
        """The cache with the new keys or values [B, K, S, D] at write_at."""
        new = self.narrow(f"{name}.new", new)
        if not self.library.has_cache_update:
            return older_versions.append(self, name, past, new, self.write_at, self.input_ids)
        return self.out(name, self.network.add_kv_cache_update(past, new, self.write_at, self.trt.KVCacheMode.LINEAR))

    def _attend(self, name: str, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """softmax(q k^T, masked) v over the whole cache: [B, H, S, D]; q carries the scale."""
        if not self.library.has_attention:
            return older_versions.attend(self, name, q, keys, values, self._mask)
        softmax = self.trt.AttentionNormalizationOp.SOFTMAX
        if hasattr(self.network, "add_attention_v2"):
            layer = self.network.add_attention_v2(q, keys, values, softmax, self.trt.CausalMaskKind.NONE)
        else:
            layer = self.network.add_attention(q, keys, values, softmax, False)
        self.made(name, layer).mask = self._mask
        if self.library.has_lengths:  # beyond them every key is masked: the kernel need not read it
            layer.key_value_lengths = self.lengths
        # There is no fused float32 kernel.
        layer.decomposable = self.precision.arithmetic == "float32"
        return self.out(name, layer)
