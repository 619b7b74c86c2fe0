"""The trace as an ONNX graph, built with onnx_ir: portable standard operators, and ONNX Runtime's fused ones.

Inputs and outputs follow the optimum / onnxruntime-genai convention: input_ids, attention_mask, position_ids int64,
past_key_values.{i}.key / .value [B, K, past, D]; logits [B, S, V], present.{i}.key / .value.
`OnnxPortable` uses opset 23 alone (Attention, RotaryEmbedding, RMSNormalization). `OnnxRuntime` overrides the coarse
operations with ONNX Runtime's contributed kernels and spells quantised matrices as MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.lowerings.base import Lowering
from export.lowerings.onnx_builder import GraphBuilder
from export.network import trace
from export.precision import CODE_BITS, ONNX_RUNTIME, Precision
from export.quantize import Quantized
from export.weights import DeployedWeights, inverse_root, position_diagonal, rope_tables
from ngpt.errors import UnsupportedError

OPSET = 23
DATA_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
# Far below the mean square of any row but a zero one, which it turns into zeros instead of NaN.
ZERO_ROW_EPSILON = 1e-30
# Other people's tools go by these names: transformers.js makes its first, empty cache from them, optimum computes sizes from them.
BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "past_sequence_length + sequence_length"


class OnnxPortable(GraphBuilder, Lowering[ir.Value]):
    """Standard operators only; the cache grows by concatenation inside Attention, rows may be padded on either side."""

    present_axis = TOTAL

    def __init__(self, weights: DeployedWeights, precision: Precision = ONNX_RUNTIME["fp32"]) -> None:
        Lowering.__init__(self, weights)
        GraphBuilder.__init__(self, DATA_TYPES[precision.arithmetic])
        self.precision = precision
        self.input_ids = self._input("input_ids", [BATCH, NEW])
        self.attention_mask = self._input("attention_mask", [BATCH, TOTAL])
        self.position_ids = self._input("position_ids", [BATCH, NEW])
        cache: list[str | int] = [BATCH, self.spec.num_kv_heads, PAST, self.cache_channels]
        for layer in range(self.spec.num_layers):
            for kind in ("key", "value"):
                self._input(f"past_key_values.{layer}.{kind}", cache, self.dtype)
        self.prepare()

    def model(self, taps: Sequence[str] = ()) -> ir.Model:
        """Trace the network and return the model; `taps` names further tensors to expose as outputs."""
        logits = trace(self)
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
        return ir.Model(graph, ir_version=11, producer_name="ngpt-deploy")

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

    def position(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        if self.spec.position == "research":
            diagonal = self._gathered_diagonal()
            return self._join(name, self._node("Mul", [self._split(name, x, heads), diagonal], f"{name}.turned"))
        cos, sin = self._rope_tables()
        # The operator indexes the caches by position_ids; the rotated width is explicit for partial rotary embedding.
        by_head = self._by_head(name, x, heads)
        turned = self._node(
            "RotaryEmbedding", [by_head, cos, sin, self.position_ids], f"{name}.turned", rotary_embedding_dim=self._rotary()
        )
        return self._join(name, self._node("Transpose", [turned], f"{name}.by_token", perm=[0, 2, 1, 3]))

    def l2norm(self, name: str, x: ir.Value, eps: float = 0.0) -> ir.Value:
        if eps == 0.0:
            size = self.spec.hidden_size
            scale = self._constant(f"unit.{size}", np.full(size, inverse_root(size), np.float32))
            return self._rms_norm(name, x, scale)
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

    def head_norm(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        size = self.spec.head_dim
        scale = self._constant(f"unit.{size}", np.full(size, inverse_root(size), np.float32))
        return self._join(name, self._rms_norm(f"{name}.by_head", self._split(name, x, heads), scale))

    def vector(self, weight: str) -> ir.Value:
        return self._weight(weight, lambda: self.weights.get(weight), self.weights.shape(weight))

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
        positive = self._node("Relu", [x], f"{name}.relu")
        return self._node("Mul", [positive, positive], name)

    def attention(self, name: str, layer: int, q: ir.Value, k: ir.Value, v: ir.Value, scale: float) -> ir.Value:
        """The cache is concatenated outside of Attention: TensorRT's ONNX parser refuses one with present outputs."""
        heads, keys = self.spec.num_heads, self.spec.num_kv_heads
        queries = self._by_head(f"{name}.queries", q, heads)
        present = []
        for kind, new in (("key", k), ("value", v)):
            past = self.inputs[f"past_key_values.{layer}.{kind}"]
            new = self._by_head(f"{name}.new_{kind}", new, keys)
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

    def _split(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        shape = self._constant(f"heads.{heads}", np.array([0, 0, heads, self.spec.head_dim], np.int64))
        return self._node("Reshape", [x, shape], f"{name}.heads")

    def _by_head(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        return self._node("Transpose", [self._split(name, x, heads)], f"{name}.by_head", perm=[0, 2, 1, 3])

    def _join(self, name: str, x: ir.Value) -> ir.Value:
        return self._node("Reshape", [x, self._constant("flat", np.array([0, 0, -1], np.int64))], name)

    def _rotary(self) -> int:
        return self.spec.rotary_dim if self.spec.rotary_dim != self.spec.head_dim else 0

    def _rope_tables(self) -> tuple[ir.Value, ir.Value]:
        shape = [self.spec.max_length, self.spec.rotary_dim // 2]
        tables = (self._weight(f"rope.{n}", lambda i=i: rope_tables(self.spec)[i], shape) for i, n in enumerate(("cos", "sin")))  # type: ignore[misc]
        cos, sin = tables
        return cos, sin

    def _gathered_diagonal(self) -> ir.Value:
        if "position.diagonal" not in self.values:
            shape = [self.spec.max_length, self.spec.head_dim]
            table = self._weight("position.table", lambda: position_diagonal(self.spec), shape)
            rows = self._node("Gather", [table, self.position_ids], "position.rows")
            self._node("Unsqueeze", [rows, self._constant("two", np.array([2], np.int64))], "position.diagonal")
        return self.values["position.diagonal"]


class OnnxRuntime(OnnxPortable):
    """ONNX Runtime's fused kernels: packed projections, GroupQueryAttention over a cache shared in place, MatMulNBits."""

    present_axis = "present_sequence_length"  # that of the shared buffer, or as in the portable form where none is shared

    @property
    def cache_channels(self) -> int:
        """GroupQueryAttention takes heads of a multiple of 8 channels: other heads get zeros at their end (`_padded`)."""
        return -(-self.spec.head_dim // 8) * 8

    def opsets(self) -> dict[str, int]:
        return {"": OPSET, "com.microsoft": 1}

    def prepare(self) -> None:
        """GroupQueryAttention wants each row's length less one, and the longest: both come from the attention mask.

        The kernel counts from the start of a row: padding before a token would be attended to, and nothing said. So rows are looked
        at: the last real token of a first call stands right after the others, and in later calls at most as far behind them as the
        past is long. A row where it does not is left out of the lengths, and Reshape, whose name is then in the runtime's error, stops.
        """
        one = self._constant("one", np.array([1], np.int64))
        count = self._node("ReduceSum", [self.attention_mask, one], "mask.lengths", keepdims=0)
        total = self._node("Shape", [self.attention_mask], "mask.total", start=1, end=2)
        past = self._node("Sub", [total, self._node("Shape", [self.input_ids], "mask.new", start=1, end=2)], "mask.past")
        last = self._node("ArgMax", [self.attention_mask], "mask.last_real", axis=1, keepdims=0, select_last_index=1)
        good = self._node("Less", [last, self._node("Add", [count, past], "mask.room")], "mask.good")
        kept = self._node("Compress", [self._node("Sub", [count, one], "mask.last"), good], "mask.last_of_good", axis=0)
        batch = self._node("Shape", [self.attention_mask], "mask.batch", start=0, end=1)
        kept = self._node("Reshape", [kept, batch], "mask.last_of_all")
        self.nodes[-1].name = "attention_mask: the fused attention takes padding on the right alone; onnx-portable takes any"
        self.last = self._node("Cast", [kept], "mask.seqlens_k", to=ir.DataType.INT32)
        self.total = self._node("Cast", [total], "mask.total_length", to=ir.DataType.INT32)

    def position(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        if self.spec.position == "research":
            return super().position(name, x, heads)
        cos, sin = self._rope_tables()
        return self._node(
            "RotaryEmbedding", [x, self.position_ids, cos, sin], name, "com.microsoft",
            num_heads=heads, rotary_embedding_dim=self._rotary(),
        )  # fmt: skip

    def queries_keys_values(self, name: str, h: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """One matrix product for q, k and v; one rotation and one norm for q and k, whose scale carries sqk**2."""
        spec = self.spec
        heads, keys, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        packed = self._matmul(f"{name}.qkv", h, [f"{name}.{part}" for part in "qkv"])
        sizes = self._constant("qk_v", np.array([(heads + keys) * size, keys * size], np.int64))
        qk, v = self._nodes("Split", [packed, sizes], [f"{name}.qk", f"{name}.v"], axis=-1)
        turned = self._split(f"{name}.qk_turned", self.position(f"{name}.qk_rope", qk, heads + keys), heads + keys)

        def scale() -> NDArray[np.float32]:
            on_q = self.weights.get(f"{name}.q_scale").reshape(heads, size)
            both: NDArray[np.float32] = np.concatenate((on_q, np.ones((keys, size), np.float32))) * np.float32(inverse_root(size))
            return both

        unit = self._rms_norm(f"{name}.qk_norm", turned, self._weight(f"{name}.qk_scale", scale, [heads + keys, size]))
        flat = self._join(f"{name}.qk_flat", unit)
        q_k = self._constant("q_k", np.array([heads * size, keys * size], np.int64))
        q, k = self._nodes("Split", [flat, q_k], [f"{name}.q_scaled", f"{name}.k_norm"], axis=-1)
        return q, k, v

    def hypersphere_update(self, name: str, h: ir.Value, x: ir.Value, rate: str, eps: float) -> ir.Value:
        """norm((1 - rate) * h + rate * norm(x)): the last sum and norm are one kernel."""
        size = self.spec.hidden_size
        if eps:
            unit = self.l2norm(f"{name}.unit", x, eps)
            pull = self._node("Mul", [unit, self.vector(rate)], f"{name}.pull")
        else:
            root = np.float32(inverse_root(size))
            pull = self._rms_norm(f"{name}.pull", x, self._weight(f"{rate}.unit", lambda: self.weights.get(rate) * root, [size]))
        keep = self._weight(f"{rate}.keep", lambda: 1 - self.weights.get(rate), [size])
        kept = self._node("Mul", [h, keep], f"{name}.kept")
        gamma = self._constant(f"unit.{size}", np.full(size, inverse_root(size), np.float32))
        return self._node(
            "SkipSimplifiedLayerNormalization", [kept, pull, gamma], name, "com.microsoft", epsilon=ZERO_ROW_EPSILON
        )

    def attention(self, name: str, layer: int, q: ir.Value, k: ir.Value, v: ir.Value, scale: float) -> ir.Value:
        heads, keys = self.spec.num_heads, self.spec.num_kv_heads
        past = [self.inputs[f"past_key_values.{layer}.{kind}"] for kind in ("key", "value")]
        wide = self.cache_channels != self.spec.head_dim
        if wide:
            parts = (("queries", q, heads), ("new_key", k, keys), ("new_value", v, keys))
            q, k, v = (self._padded(f"{name}.{part}", x, count) for part, x, count in parts)
        outputs = [f"{name}.wide" if wide else name, f"present.{layer}.key", f"present.{layer}.value"]
        out, *present = self._nodes(
            "GroupQueryAttention", [q, k, v, *past, self.last, self.total], outputs, "com.microsoft",
            num_heads=heads, kv_num_heads=keys, scale=scale, do_rotary=0,
        )  # fmt: skip
        self._present(present)
        return self._narrowed(name, out, heads) if wide else out

    def _padded(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        """Each head with zeros up to `cache_channels`: they add nothing to a dot product and leave as zeros."""
        more = self._constant("head_padding", np.array([0, self.cache_channels - self.spec.head_dim], np.int64))
        last = self._constant("last", np.array([-1], np.int64))
        return self._join(f"{name}.wide", self._node("Pad", [self._split(name, x, heads), more, None, last], f"{name}.padded"))

    def _narrowed(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        """The channels of each head without the padding."""
        shape = self._constant(f"wide_heads.{heads}", np.array([0, 0, heads, self.cache_channels], np.int64))
        by_head = self._node("Reshape", [x, shape], f"{name}.wide_heads")
        start, end, axis = (self._constant(f"narrow.{n}", np.array([n], np.int64)) for n in (0, self.spec.head_dim, -1))
        return self._join(name, self._node("Slice", [by_head, start, end, axis], f"{name}.narrow"))

    def _multiply(
        self, name: str, x: ir.Value, load: Callable[[], NDArray[np.float32]], rows: int, columns: int, bias: ir.Value | None
    ) -> ir.Value:
        stored = self.precision.format_of(name)
        if stored.plain:
            return super()._multiply(name, x, load, rows, columns, bias)
        if stored.code not in ("int8", "int4"):
            raise UnsupportedError("format of weights in ONNX Runtime", expected="int8 or int4", found=str(stored))
        bits, block = CODE_BITS[stored.code], stored.block_of(columns)
        blocks = -(-columns // block)

        @lru_cache(maxsize=1)
        def quantized() -> Quantized:
            return stored.quantize(load())

        def scales() -> NDArray[np.float32]:
            result = quantized().scales.reshape(-1)
            quantized.cache_clear()  # written after the data: nothing of this matrix is needed any more
            return result

        data = self._weight(f"{name}.data", lambda: quantized().data, [rows, blocks, block * bits // 8], dtype=ir.DataType.UINT8)
        scale = self._weight(f"{name}.scales", scales, [rows * blocks])
        inputs = [x, data, scale] if bias is None else [x, data, scale, None, None, bias]
        return self._node(
            "MatMulNBits", inputs, name, "com.microsoft", K=columns, N=rows, bits=bits, block_size=block, accuracy_level=4
        )


def _stack(weights: DeployedWeights, parts: Sequence[str], kind: str) -> NDArray[np.float32]:
    return np.concatenate([weights.get(f"{part}.{kind}") for part in parts])
