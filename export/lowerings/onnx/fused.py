"""The network with ONNX Runtime's own kernels: fused operations, a cache shared in place, quantised matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.lowerings.onnx.portable import OPSET, ZERO_ROW_EPSILON, OnnxPortable
from export.precision import CODE_BITS
from export.quantize import Quantized
from export.weights import inverse_root
from ngpt.errors import UnsupportedError


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

        The kernel counts from the start of a row: padding before a token would be attended to, and nothing said. So
        rows are looked at: the last real token of a first call stands right after the others, and in later calls at
        most as far behind them as the past is long. A row where it does not is left out of the lengths, and Reshape,
        whose name is then in the runtime's error, stops.
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

    def queries_keys_values(self, name: str, h: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """One matrix product for q, k and v; one rotation and one norm for q and k, whose scale carries sqk**2."""
        spec = self.spec
        heads, keys, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        packed = self._matmul(f"{name}.qkv", h, [f"{name}.{part}" for part in "qkv"])
        sizes = self._constant("qk_v", np.array([(heads + keys) * size, keys * size], np.int64))
        qk, v = self._nodes("Split", [packed, sizes], [f"{name}.qk", f"{name}.v"], axis=-1)
        if spec.position == "rope":  # of packed heads, as the kernel takes them
            cos, sin = self._rope_tables()
            qk = self._node(
                "RotaryEmbedding",
                [qk, self.position_ids, cos, sin],
                f"{name}.qk_rope",
                "com.microsoft",
                num_heads=heads + keys,
                rotary_embedding_dim=self._rotary(),
            )
        turned = self.split_heads(f"{name}.qk_turned", qk, heads + keys)
        if spec.position == "research":
            turned = self.position(f"{name}.qk_rope", turned)

        def scale() -> NDArray[np.float32]:
            on_q = self.weights.get(f"{name}.q_scale").reshape(heads, size)
            both: NDArray[np.float32] = np.concatenate((on_q, np.ones((keys, size), np.float32))) * np.float32(inverse_root(size))
            return both

        unit = self._rms_norm(f"{name}.qk_norm", turned, self._weight(f"{name}.qk_scale", scale, [heads + keys, size]))
        flat = self._join(f"{name}.qk_flat", unit)
        q_k = self._constant("q_k", np.array([heads * size, keys * size], np.int64))
        q, k = self._nodes("Split", [flat, q_k], [f"{name}.q_scaled", f"{name}.k_norm"], axis=-1)
        counted = ((q, heads), (k, keys), (v, keys))
        q, k, v = (self.split_heads(f"{x.name}.heads", x, count) for x, count in counted)  # `attention` takes them as they were
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
        return self._node(
            "SkipSimplifiedLayerNormalization", [kept, pull, self._unit(size)], name, "com.microsoft", epsilon=ZERO_ROW_EPSILON
        )

    def attention(self, name: str, layer: int, q: ir.Value, k: ir.Value, v: ir.Value, scale: float) -> ir.Value:
        heads, keys = self.spec.num_heads, self.spec.num_kv_heads
        past = [self.inputs[f"past_key_values.{layer}.{kind}"] for kind in ("key", "value")]
        wide = self.cache_channels != self.spec.head_dim
        packed = self._padded if wide else self._packed
        q, k, v = (packed(f"{name}.{part}", x) for part, x in (("queries", q), ("new_key", k), ("new_value", v)))
        outputs = [f"{name}.wide" if wide else name, f"present.{layer}.key", f"present.{layer}.value"]
        out, *present = self._nodes(
            "GroupQueryAttention",
            [q, k, v, *past, self.last, self.total],
            outputs,
            "com.microsoft",
            num_heads=heads,
            kv_num_heads=keys,
            scale=scale,
            do_rotary=0,
        )
        self._present(present)
        return self._narrowed(name, out, heads) if wide else out

    def _packed(self, name: str, x: ir.Value) -> ir.Value:
        """[B, S, heads, D] as the kernel reads it: [B, S, heads * D]. What `split_heads` made is taken as it was before."""
        split = x.producer()
        if split is not None and split.op_type == "Reshape":
            assert split.inputs[0] is not None
            return split.inputs[0]
        return self._join(f"{name}.packed", x)

    def _padded(self, name: str, x: ir.Value) -> ir.Value:
        """As `_packed`, each head with zeros up to `cache_channels`: they add nothing to a dot product and leave as zeros."""
        more = self._constant("head_padding", np.array([0, self.cache_channels - self.spec.head_dim], np.int64))
        last = self._constant("last", np.array([-1], np.int64))
        return self._join(f"{name}.wide", self._node("Pad", [x, more, None, last], f"{name}.padded"))

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
        if block & (block - 1):
            raise UnsupportedError(f"block of {name} in ONNX Runtime", expected="a power of two", found=str(block))
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
