"""Faults of the network: mixins that go before a lowering, and spell one operation wrongly.

What every lowering has is overridden once; where a fault has to be spelled in a runtime's own words, `spelled` is that
lowering's dialect.
"""

import math

import numpy as np

from export.lowerings.base import Lowering
from tests.mutations.weights import LAYER


class OnnxWords:
    """The few operations that faults need beside the vocabulary, in ONNX."""

    def times(self, name, x, factor):
        return self._node("Mul", [x, self._constant(f"times.{factor}", np.array(factor, np.float32))], name)

    def over_root(self, name, x, inside):
        """x / sqrt(sum x^2 + inside)."""
        axes = self._constant("last", np.array([-1], np.int64))
        squares = self._node("ReduceSumSquare", [x, axes], f"{name}.squares", keepdims=1)
        more = self._node("Add", [squares, self._constant(f"inside.{inside}", np.array(inside, np.float32))], f"{name}.more")
        return self._node("Div", [x, self._node("Sqrt", [more], f"{name}.root")], name)

    def over_largest(self, name, x, floor):
        """x / max(||x||, floor)."""
        axes = self._constant("last", np.array([-1], np.int64))
        length = self._node("ReduceL2", [x, axes], f"{name}.length", keepdims=1)
        floored = self._node("Max", [length, self._constant(f"floor.{floor}", np.array(floor, np.float32))], f"{name}.floored")
        return self._node("Div", [x, floored], name)

    def through(self, name, x, dtype):
        """x rounded to another type and back."""
        import onnx_ir as ir

        narrow = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}[dtype]
        return self._node("Cast", [self._node("Cast", [x], f"{name}.narrow", to=narrow)], name, to=self.dtype)


class TensorRTWords:
    """The same in TensorRT's layers."""

    def times(self, name, x, factor):
        return self.mul(name, x, self.scalar(f"{name}.factor", factor, len(x.shape)))

    def _length(self, name, x, inside=0.0):
        x = self.wide(f"{name}.wide", x)
        axes = 1 << (len(x.shape) - 1)
        total = self.network.add_reduce(self.mul(f"{name}.squares", x, x), self.trt.ReduceOperation.SUM, axes, True)
        total = self.out(f"{name}.total", total)
        if inside:
            total = self.add(f"{name}.more", total, self.scalar(f"{name}.inside", inside, len(x.shape)))
        return x, self.out(f"{name}.length", self.network.add_unary(total, self.trt.UnaryOperation.SQRT))

    def over_root(self, name, x, inside):
        return self.binary(name, *self._length(name, x, inside), self.trt.ElementWiseOperation.DIV)

    def over_largest(self, name, x, floor):
        x, length = self._length(name, x)
        operations = self.trt.ElementWiseOperation
        floored = self.binary(f"{name}.floored", length, self.scalar(f"{name}.floor", floor, len(x.shape)), operations.MAX)
        return self.binary(name, x, floored, operations.DIV)

    def through(self, name, x, dtype):
        back = x.dtype
        return self.cast(name, self.cast(f"{name}.narrow", x, self.library.dtype(dtype)), back, always=True)


class TrtllmWords:
    """The same in `tensorrt_llm.functional`."""

    def times(self, name, x, factor):
        return x * factor

    def over_root(self, name, x, inside):
        x = self._wide(x)
        return x / self.f.sqrt(self.f.sum(x * x, dim=x.ndim() - 1, keepdim=True) + inside)

    def over_largest(self, name, x, floor):
        x = self._wide(x)
        return x / self.f.maximum(self.f.sqrt(self.f.sum(x * x, dim=x.ndim() - 1, keepdim=True)), floor)

    def through(self, name, x, dtype):
        return self.f.cast(self.f.cast(x, dtype), x.dtype)


class Composed:
    """q, k and v made of fine operations, as a lowering without a fused form has them."""

    def queries_keys_values(self, name, h):
        return Lowering.queries_keys_values(self, name, h)


class DividedScale:
    """scores / sqrt(D), as in an ordinary transformer."""

    def attention(self, name, layer, q, k, v, scale):
        return super().attention(name, layer, q, k, v, 1 / scale)


class SqkBeforeRotation(Composed):
    """q is scaled first, then turned and normalised."""

    def qk_norm(self, name, q, k):
        q = self.mul(f"{name}.q_early", q, self.head_vector(f"{name}.q_scale", self.spec.num_heads))
        q = self.l2norm(f"{name}.q_scaled", self.position(f"{name}.q_rope", q))
        return q, self.l2norm(f"{name}.k_norm", self.position(f"{name}.k_rope", k))


class RotationAfterNorm(Composed):
    """q is normalised, scaled, and turned last: k may be turned there, q may not."""

    def qk_norm(self, name, q, k):
        q = self.l2norm(f"{name}.q_norm", q)
        q = self.mul(f"{name}.q_early", q, self.head_vector(f"{name}.q_scale", self.spec.num_heads))
        k = self.l2norm(f"{name}.k_norm", self.position(f"{name}.k_rope", k))
        return self.position(f"{name}.q_scaled", q), k


class KeysNotNormalised(Composed):
    """Keys go into the cache as they leave the rotation, and are read from it as they are."""

    def qk_norm(self, name, q, k):
        q = self.l2norm(f"{name}.q_norm", self.position(f"{name}.q_rope", q))
        q = self.mul(f"{name}.q_scaled", q, self.head_vector(f"{name}.q_scale", self.spec.num_heads))
        return q, self.position(f"{name}.k_norm", k)


class KeysCachedBeforeNorm(Composed):
    """The step's own keys are normalised, those that are kept for later steps are not (a graph that grows its cache)."""

    def qk_norm(self, name, q, k):
        self.raw = self.position(f"{name}.k_raw", k)
        return super().qk_norm(name, q, k)

    def attention(self, name, layer, q, k, v, scale):
        out = super().attention(name, layer, q, k, v, scale)
        at = next(i for i, value in enumerate(self.outputs) if value.name == f"present.{layer}.key")
        used = self.outputs[at]
        used.name, used.producer().name = f"{name}.keys", f"{name}.keys/Concat"
        past = self.inputs[f"past_key_values.{layer}.key"]
        kept = self._node("Concat", [past, self._head_first(f"{name}.raw", self.raw)], f"present.{layer}.key", axis=2)
        kept.type, kept.shape = used.type, used.shape
        self.outputs[at] = kept
        return out


class ValuesNormalised(Composed):
    """Values are normalised like keys."""

    def queries_keys_values(self, name, h):
        q, k, v = super().queries_keys_values(name, h)
        return q, k, self.l2norm(f"{name}.v_norm", v)


class InterleavedOnnx:
    """Pairs of channels are neighbours (2i, 2i + 1), where the checkpoint has halves (i, i + R / 2)."""

    def _node(self, op, inputs, name, domain="", **attributes):
        more = {"interleaved": 1} if op == "RotaryEmbedding" else {}
        return super()._node(op, inputs, name, domain, **attributes, **more)


class InterleavedTensorRT:
    """The same, of TensorRT's rotary layer."""

    def position(self, name, x):
        from export.weights import rope_tables

        cos, sin = (self.constant(f"rope.{n}", t) for n, t in zip(("cos", "sin"), rope_tables(self.spec), strict=True))
        layer = self.network.add_rotary_embedding(self.wide(f"{name}.wide", x), cos, sin, True, self.spec.rotary_dim)
        self.made(name, layer).set_input(3, self.position_ids)
        return self.out(name, layer)


class InterleavedTrtllm:
    """The same, composed. Every channel of these heads is turned."""

    def position(self, name, x):
        from export.weights import rope_tables

        half, at = self.spec.rotary_dim // 2, self._leading + 1
        cos = self._rows("rope.cos", lambda: rope_tables(self.spec)[0])
        sin = self._rows("rope.sin", lambda: rope_tables(self.spec)[1])
        heads = x.shape[self._leading]
        whole = self.f.view(self._wide(x), [0] * self._leading + [heads, half, 2])
        a, b = (self.f.view(part, [0] * self._leading + [heads, half]) for part in self.f.split(whole, [1, 1], dim=at + 1))
        turned = [a * cos - b * sin, b * cos + a * sin]
        pairs = [self.f.view(part, [0] * self._leading + [heads, half, 1]) for part in turned]
        return self.f.view(self.f.concat(pairs, dim=at + 1), [0] * self._leading + [heads, 2 * half])


class FinalNorm:
    """An RMS norm before the head, as most architectures have one: of a unit vector it makes one of length sqrt(E)."""

    def linear(self, name, x):
        if name == "head":
            x = self.times("final_norm", self.l2norm("final_norm.unit", x), math.sqrt(self.spec.hidden_size))
        return super().linear(name, x)


class UpdateNotNormalised:
    """h + rate * (norm(x) - h), left as long as it is."""

    def hypersphere_update(self, name, h, x, rate, eps):
        step = self.sub(f"{name}.step", self.l2norm(f"{name}.unit", x, eps), h)
        moved = self.add(name, h, self.mul(f"{name}.scaled", self.vector(rate), step))
        return self.tap(name, moved) if hasattr(self, "tap") else moved


class ResidualAdded:
    """norm(h + rate * norm(x)): a step, and not a step towards."""

    def hypersphere_update(self, name, h, x, rate, eps):
        step = self.mul(f"{name}.scaled", self.vector(rate), self.l2norm(f"{name}.unit", x, eps))
        moved = self.l2norm(name, self.add(f"{name}.moved", h, step))
        return self.tap(name, moved) if hasattr(self, "tap") else moved


class BranchNotNormalised:
    """norm(h + rate * (x - h)): the branch's output is taken as long as it is."""

    def hypersphere_update(self, name, h, x, rate, eps):
        step = self.mul(f"{name}.scaled", self.vector(rate), self.sub(f"{name}.step", x, h))
        moved = self.l2norm(name, self.add(f"{name}.moved", h, step))
        return self.tap(name, moved) if hasattr(self, "tap") else moved


class EpsDropped:
    """The MLP's branch is divided by its length alone."""

    @property
    def mlp_eps(self):
        return 0.0


class UpdateOf:
    """The update composed, with a norm of the branch of the fault's own where it has an eps."""

    def hypersphere_update(self, name, h, x, rate, eps):
        unit = self.branch(f"{name}.unit", x, eps) if eps else self.l2norm(f"{name}.unit", x)
        step = self.sub(f"{name}.step", unit, h)
        moved = self.l2norm(name, self.add(f"{name}.moved", h, self.mul(f"{name}.scaled", self.vector(rate), step)))
        return self.tap(name, moved) if hasattr(self, "tap") else moved


class EpsUnderRoot(UpdateOf):
    """x / sqrt(||x||^2 + eps)."""

    def branch(self, name, x, eps):
        return self.over_root(name, x, eps)


class EpsAsFloor(UpdateOf):
    """x / max(||x||, eps)."""

    def branch(self, name, x, eps):
        return self.over_largest(name, x, eps)


class EpsSquaredUnderRoot(UpdateOf):
    """x / sqrt(||x||^2 + eps^2)."""

    def branch(self, name, x, eps):
        return self.over_root(name, x, eps * eps)


class EpsOfLargeModels(UpdateOf):
    """1e-5, a usual norm's, in the place of this one's 1e-6."""

    def branch(self, name, x, eps):
        return self.l2norm(name, x, 10 * eps)


class NoGuard(UpdateOf):
    """A branch that is exactly zero is divided by its length."""

    def branch(self, name, x, eps):
        return self.over_root(name, x, 0.0)


class HeadNormEps(Composed):
    """q and k through a usual RMS norm, whose 1e-6 stands under the root."""

    def l2norm(self, name, x, eps=0.0):
        if name.endswith((".q_norm", ".k_norm")):
            return self.over_root(name, x, 1e-6 * self.spec.head_dim)
        return super().l2norm(name, x, eps)


class ActivationRelu:
    """relu in the place of relu2."""

    def activation(self, name, kind, x):
        return super().activation(name, "relu", x)


class LogitsInHalf:
    """Logits rounded to float16 on their way out of a float32 engine."""

    def linear(self, name, x):
        out = super().linear(name, x)
        return self.through("head.narrowed", out, "float16") if name == "head" else out


class StateInHalf:
    """The hidden state is kept in bfloat16 between two layers of a float32 engine."""

    def hypersphere_update(self, name, h, x, rate, eps):
        if name != f"layers.{LAYER}.attn.update":
            return super().hypersphere_update(name, h, x, rate, eps)
        h = super().hypersphere_update(f"{name}.whole", h, x, rate, eps)
        narrow = self.through(name, h, "bfloat16")
        return self.tap(name, narrow) if hasattr(self, "tap") else narrow


class MaskAheadPortable:
    """A query sees the key after its own."""

    def _node(self, op, inputs, name, domain="", **attributes):
        if name == "mask.causal":
            keys, rows = inputs
            one = self._constant("one", np.array([1], np.int64))
            inputs = [keys, super()._node("Add", [rows, one], "mask.rows_and_one")]
        return super()._node(op, inputs, name, domain, **attributes)


class MaskAheadTensorRT:
    """A query sees the key after its own."""

    def reshape(self, name, x, shape, then=None, first=None):
        out = super().reshape(name, x, shape, then, first)
        if name != "mask.queries":
            return out
        one = self.constant("mask.one", np.ones((1, 1, 1, 1), np.int32))
        return self.binary("mask.queries_and_one", out, one, self.trt.ElementWiseOperation.SUM)


class ZeroPointOffTensorRT:
    """Integer codes are one too high: the offset is taken off wrongly."""

    def constant(self, name, array, dtype=None, shape=None):
        if name.endswith(".data") and array.dtype == np.int8:
            array = np.minimum(array.astype(np.int16) + 1, 127).astype(np.int8)
        elif name.endswith(".data") and array.dtype == np.uint8:  # two nibbles a byte, in two's complement
            nibbles = np.stack((array & 15, array >> 4), axis=-1).astype(np.int8)
            nibbles = np.minimum(np.where(nibbles > 7, nibbles - 16, nibbles) + 1, 7).astype(np.uint8) & 15
            array = nibbles[..., 0] | (nibbles[..., 1] << 4)
        return super().constant(name, array, dtype, shape)


class BlockDoubledTensorRT:
    """One scale of one matrix is twice as large."""

    def weight(self, name, load, shape):
        def changed():
            value = load().copy()
            value.reshape(-1)[np.abs(value).argmax()] *= 2
            return value

        return super().weight(name, changed if name == f"layers.{LAYER}.mlp.down.weight.scales" else load, shape)
