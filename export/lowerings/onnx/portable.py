"""The network as an ONNX graph of standard operators, built with onnx_ir.

Opset 23 brings Attention, RotaryEmbedding and RMSNormalization.

Inputs and outputs follow the optimum / onnxruntime-genai convention: input_ids, attention_mask, position_ids int64,
past_key_values.{i}.key / .value [B, K, past, D]; logits [B, S, V], present.{i}.key / .value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.lowerings.base import Lowering
from export.lowerings.onnx.builder import GraphBuilder
from export.precision import ONNX_RUNTIME, Precision
from export.weights import DeployedWeights, inverse_root, position_diagonal, rope_tables
from ngpt.errors import UnsupportedError

OPSET = 23
DATA_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
# Far below the mean square of any row but a zero one, which it turns into zeros instead of NaN.
ZERO_ROW_EPSILON = 1e-30
# Other people's tools go by these names: transformers.js makes its first, empty cache from them, optimum computes
# sizes from them.
BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length"


class OnnxPortable(GraphBuilder, Lowering[ir.Value]):
    """Standard operators only; the cache grows by concatenation inside Attention, rows may be padded on either side."""

    present_axis = TOTAL

    def __init__(self, weights: DeployedWeights, precision: Precision = ONNX_RUNTIME["fp32"]) -> None:
        Lowering.__init__(self, weights)
        GraphBuilder.__init__(self, DATA_TYPES[precision.arithmetic])
        self.precision = precision
        # Values here have no shape: the size of the last axis, by name, where it is not the hidden size.
        self.channels: dict[str, int] = {}
        self.input_ids = self._input("input_ids", [BATCH, NEW])
        self.attention_mask = self._input("attention_mask", [BATCH, TOTAL])
        self.position_ids = self._input("position_ids", [BATCH, NEW])
        cache: list[str | int] = [BATCH, self.spec.num_kv_heads, PAST, self.cache_channels]
        for layer in range(self.spec.num_layers):
            for kind in ("key", "value"):
                self._input(f"past_key_values.{layer}.{kind}", cache, self.dtype)
        self.prepare()

    def finish(self, logits: ir.Value, taps: Sequence[str] = ()) -> ir.Model:
        """The model whose first output is `logits` [B, S, V], in float32; `taps` names further tensors to expose as outputs."""
        if self.dtype != ir.DataType.FLOAT:
            logits = self._node("Cast", [logits], "logits", to=ir.DataType.FLOAT)
        else:
            logits = self._node("Identity", [logits], "logits")
        shape = ir.Shape([BATCH, NEW, self.spec.vocab_size])
        logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), shape
        outputs = [logits, *self.outputs, *(self._tap(name) for name in taps)]
        graph = ir.Graph(
            list(self.inputs.values()),
            outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=self.opsets(),
            name="ngpt",
        )
        model = ir.Model(graph, ir_version=11, producer_name="ngpt-deploy")
        RemoveUnusedNodesPass()(model)  # views of heads that a kernel did without
        return model

    @property
    def cache_channels(self) -> int:
        """Channels of a cached head."""
        return self.spec.head_dim

    def opsets(self) -> dict[str, int]:
        """Operator sets the graph uses."""
        return {"": OPSET}

    def prepare(self) -> None:
        """What all layers share: the mask, true where a query may look. A padded query sees itself, so it is never NaN."""
        one, zero = self._constant("one", np.array([1], np.int64)), self._constant("zero", np.array([0], np.int64))
        total = self._node("Shape", [self.attention_mask], "mask.total", start=1, end=2)
        new = self._node("Shape", [self.input_ids], "mask.new", start=1, end=2)
        total_0d = self._node("Squeeze", [total, zero], "mask.total_scalar")
        new_0d = self._node("Squeeze", [new, zero], "mask.new_scalar")
        start = self._constant("zero_scalar", np.array(0, np.int64))
        step = self._constant("one_scalar", np.array(1, np.int64))
        keys = self._node("Range", [start, total_0d, step], "mask.keys")
        steps = self._node("Range", [start, new_0d, step], "mask.steps")
        queries = self._node("Add", [steps, self._node("Sub", [total, new], "mask.past")], "mask.query_positions")
        rows = self._node("Unsqueeze", [queries, one], "mask.rows")
        causal = self._node("LessOrEqual", [keys, rows], "mask.causal")
        own = self._node("Equal", [keys, rows], "mask.own")
        real = self._node("Cast", [self.attention_mask], "mask.real", to=ir.DataType.BOOL)
        real = self._node("Unsqueeze", [real, self._constant("axes", np.array([1, 2], np.int64))], "mask.real_keys")
        visible = self._node("And", [causal, real], "mask.visible")
        self.mask = self._node("Or", [visible, own], "mask")

    # -- fine operations ---------------------------------------------------------------------------------------------

    def embedding(self, name: str) -> ir.Value:
        stored = DATA_TYPES[self.precision.embedding.code]
        narrow = stored != self.dtype
        table = self._weight("embed.table", lambda: self.weights.get("embed"), self.weights.shape("embed"), dtype=stored)
        rows = self._node("Gather", [table, self.input_ids], f"{name}.rows" if narrow else name)
        return self._node("Cast", [rows], name, to=self.dtype) if narrow else rows

    def linear(self, name: str, x: ir.Value) -> ir.Value:
        return self._matmul(name, x, [name])

    def split_heads(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        self.channels[name] = self.spec.head_dim
        shape = self._constant(f"heads.{heads}", np.array([0, 0, heads, self.spec.head_dim], np.int64))
        return self._node("Reshape", [x, shape], name)

    def position(self, name: str, x: ir.Value) -> ir.Value:
        self.channels[name] = self.spec.head_dim
        if self.spec.position == "research":
            return self._node("Mul", [x, self._gathered_diagonal()], name)
        cos, sin = self._rope_tables()
        # The operator indexes the caches by position_ids; the rotated width is explicit for partial rotary embedding.
        turned = self._node(
            "RotaryEmbedding",
            [self._head_first(name, x), cos, sin, self.position_ids],
            f"{name}.turned",
            rotary_embedding_dim=self._rotary(),
        )
        return self._node("Transpose", [turned], name, perm=[0, 2, 1, 3])

    def l2norm(self, name: str, x: ir.Value, eps: float = 0.0) -> ir.Value:
        if eps == 0.0:
            return self._rms_norm(name, x, self._unit(self.channels.get(str(x.name), self.spec.hidden_size)))
        # The eps stands beside the length, not under the root, so RMSNormalization would say something else.
        axes = self._constant("last", np.array([-1], np.int64))
        wide = self._wide(x, name)
        length = self._node("ReduceL2", [wide, axes], f"{name}.length", keepdims=1)
        length = self._node(
            "Add", [length, self._constant(f"eps.{eps}", np.array(eps, np.float32), wide=True)], f"{name}.guarded"
        )
        if self.dtype == ir.DataType.FLOAT:
            return self._node("Div", [wide, length], name)
        return self._node("Cast", [self._node("Div", [wide, length], f"{name}.wide_unit")], name, to=self.dtype)

    def vector(self, weight: str) -> ir.Value:
        return self._weight(weight, lambda: self.weights.get(weight), self.weights.shape(weight))

    def head_vector(self, weight: str, heads: int) -> ir.Value:
        shape = (heads, self.spec.head_dim)
        return self._weight(weight, lambda: self.weights.get(weight).reshape(shape), shape)

    def add(self, name: str, x: ir.Value, y: ir.Value) -> ir.Value:
        return self._node("Add", [x, y], name)

    def sub(self, name: str, x: ir.Value, y: ir.Value) -> ir.Value:
        return self._node("Sub", [x, y], name)

    def mul(self, name: str, x: ir.Value, y: ir.Value) -> ir.Value:
        return self._node("Mul", [x, y], name)

    def activation(self, name: str, kind: str, x: ir.Value) -> ir.Value:
        if kind == "silu":
            return self._node("Mul", [x, self._node("Sigmoid", [x], f"{name}.sigmoid")], name)
        if kind in ("gelu", "gelu_tanh"):
            return self._node("Gelu", [x], name, approximate="tanh" if kind == "gelu_tanh" else "none")
        if kind == "relu":
            return self._node("Relu", [x], name)
        if kind != "relu2":
            raise UnsupportedError("activation in ONNX", expected="relu2, relu, silu, gelu, gelu_tanh", found=kind)
        positive = self._node("Relu", [x], f"{name}.relu")
        return self._node("Mul", [positive, positive], name)

    def attention(self, name: str, layer: int, q: ir.Value, k: ir.Value, v: ir.Value, scale: float) -> ir.Value:
        """The cache is concatenated outside of Attention: TensorRT's ONNX parser refuses one with present outputs."""
        queries = self._head_first(f"{name}.queries", q)
        present = []
        for kind, new in (("key", k), ("value", v)):
            past = self.inputs[f"past_key_values.{layer}.{kind}"]
            new = self._head_first(f"{name}.new_{kind}", new)
            present.append(self._node("Concat", [past, new], f"present.{layer}.{kind}", axis=2))
        self._present(present)
        out = self._node("Attention", [queries, *present, self.mask], f"{name}.by_head", scale=scale)
        return self._join(name, self._node("Transpose", [out], f"{name}.by_token", perm=[0, 2, 1, 3]))

    # -- building blocks -----------------------------------------------------------------------------------------------

    def _present(self, values: Sequence[ir.Value]) -> None:
        for value in values:
            value.type = ir.TensorType(self.dtype)
            value.shape = ir.Shape([BATCH, self.spec.num_kv_heads, self.present_axis, self.cache_channels])
            self.outputs.append(value)

    def _tap(self, name: str) -> ir.Value:
        value = self.values[name]
        if value.type is None:
            value.type = ir.TensorType(self.dtype)
        return value

    def _matmul(self, name: str, x: ir.Value, parts: Sequence[str]) -> ir.Value:
        """x times the stacked matrices of `parts`, with their stacked biases."""
        columns = self.weights.shape(f"{parts[0]}.weight")[1]
        rows = sum(self.weights.shape(f"{part}.weight")[0] for part in parts)
        bias = None
        if self.weights.has(f"{parts[0]}.bias"):
            bias = self._weight(f"{name}.bias", lambda: _stack(self.weights, parts, "bias"), [rows])
        return self._multiply(name, x, lambda: _stack(self.weights, parts, "weight"), rows, columns, bias)

    def _multiply(
        self, name: str, x: ir.Value, load: Callable[[], NDArray[np.float32]], rows: int, columns: int, bias: ir.Value | None
    ) -> ir.Value:
        matrix = self._weight(f"{name}.weight", lambda: load().T, [columns, rows])
        if bias is None:
            return self._node("MatMul", [x, matrix], name)
        return self._node("Add", [self._node("MatMul", [x, matrix], f"{name}.product"), bias], name)

    def _rms_norm(self, name: str, x: ir.Value, scale: ir.Value) -> ir.Value:
        return self._node("RMSNormalization", [x, scale], name, axis=-1, epsilon=ZERO_ROW_EPSILON)

    def _wide(self, x: ir.Value, name: str) -> ir.Value:
        return x if self.dtype == ir.DataType.FLOAT else self._node("Cast", [x], f"{name}.wide", to=ir.DataType.FLOAT)

    def _unit(self, size: int) -> ir.Value:
        """The scale that makes an l2 norm of the root mean square over so many channels."""
        return self._constant(f"unit.{size}", np.full(size, inverse_root(size), np.float32))

    def _head_first(self, name: str, x: ir.Value) -> ir.Value:
        """[B, S, heads, D] as the operators want it: [B, heads, S, D]."""
        return self._node("Transpose", [x], f"{name}.by_head", perm=[0, 2, 1, 3])

    def _join(self, name: str, x: ir.Value) -> ir.Value:
        return self._node("Reshape", [x, self._constant("flat", np.array([0, 0, -1], np.int64))], name)

    def _rotary(self) -> int:
        return self.spec.rotary_dim if self.spec.rotary_dim != self.spec.head_dim else 0

    def _rope_tables(self) -> tuple[ir.Value, ir.Value]:
        shape = [self.spec.max_length, self.spec.rotary_dim // 2]
        cos = self._weight("rope.cos", lambda: rope_tables(self.spec)[0], shape)
        return cos, self._weight("rope.sin", lambda: rope_tables(self.spec)[1], shape)

    def _gathered_diagonal(self) -> ir.Value:
        if "position.diagonal" not in self.values:
            shape = [self.spec.max_length, self.spec.head_dim]
            table = self._weight("position.table", lambda: position_diagonal(self.spec), shape)
            rows = self._node("Gather", [table, self.position_ids], "position.rows")
            self._node("Unsqueeze", [rows, self._constant("two", np.array([2], np.int64))], "position.diagonal")
        return self.values["position.diagonal"]


def _stack(weights: DeployedWeights, parts: Sequence[str], kind: str) -> NDArray[np.float32]:
    return np.concatenate([weights.get(f"{part}.{kind}") for part in parts])
