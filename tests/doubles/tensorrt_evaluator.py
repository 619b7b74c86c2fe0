"""TEST DOUBLE: computes a TensorRT network in NumPy, layer by layer, as the library holds it.

It walks the finished INetworkDefinition (layer types, parameters, constants read back from the library), so what is checked is
the network TensorRT was given, not what we meant to give it. Each layer's meaning is our reading of NVIDIA's operator
documentation; only a run on a GPU proves that reading. Arithmetic is float64, and every output is rounded to its tensor's type.
"""

from __future__ import annotations

import ctypes
import math

import ml_dtypes
import numpy as np

_ERF = np.vectorize(math.erf, otypes=[np.float64])


class Evaluator:
    """``Evaluator(trt, network)(feeds) -> {output name: array}``; raises NotImplementedError for a layer it does not know.

    ``instead``: layer name -> function of all arrays known so far, by tensor name, that gives the layer's output.
    """

    def __init__(self, trt, network, instead=None):
        self.trt, self.network, self.instead = trt, network, instead or {}
        self.types = {
            trt.DataType.FLOAT: np.dtype(np.float32), trt.DataType.HALF: np.dtype(np.float16),
            trt.DataType.BF16: np.dtype(ml_dtypes.bfloat16), trt.DataType.INT32: np.dtype(np.int32),
            trt.DataType.INT64: np.dtype(np.int64), trt.DataType.BOOL: np.dtype(bool), trt.DataType.INT8: np.dtype(np.int8),
            trt.DataType.FP8: np.dtype(ml_dtypes.float8_e4m3fn),
        }  # fmt: skip
        self.kinds = {}
        self.layers = [self._typed(network.get_layer(i)) for i in range(network.num_layers)]
        self.constants = {}

    def _typed(self, layer):
        """The binding hands out plain ILayers; the class that fits `type` gives access to its parameters."""
        # Kept apart: on an activation layer `type` turns into the kind of activation once it has its class.
        assert layer.name not in self.kinds, f"two layers are named {layer.name}"
        self.kinds[layer.name] = layer.type.name.lower()
        words = layer.type.name.split("_")
        special = {"MATRIX_MULTIPLY": "IMatrixMultiplyLayer", "ELEMENTWISE": "IElementWiseLayer", "SOFTMAX": "ISoftMaxLayer",
                   "KV_CACHE_UPDATE": "IKVCacheUpdateLayer"}  # fmt: skip
        name = special.get("_".join(words), "I" + "".join(w.capitalize() for w in words) + "Layer")
        layer.__class__ = getattr(self.trt, name)
        return layer

    def __call__(self, feeds):
        """Arrays by input name -> arrays by output name, in the tensors' own types."""
        known = {}
        for i in range(self.network.num_inputs):
            tensor = self.network.get_input(i)
            value = np.asarray(feeds[tensor.name], dtype=self.types[tensor.dtype])
            fits = len(value.shape) == len(tensor.shape) and all(
                want in (-1, got) for want, got in zip(tensor.shape, value.shape, strict=True)
            )
            assert fits, f"input {tensor.name}: expected {tuple(tensor.shape)}, found {value.shape}"
            known[tensor.name] = value
        for layer in self.layers:
            inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
            values = [None if tensor is None else known[tensor.name] for tensor in inputs]
            kind = self.kinds[layer.name]
            method = getattr(self, f"_{kind}", None)
            if method is None:
                raise NotImplementedError(f"layer {layer.name} of type {layer.type}")
            out = layer.get_output(0)
            result = self.instead[layer.name](known) if layer.name in self.instead else method(layer, *values)
            known[out.name] = result if kind == "attention_input" else self._rounded(result, out)
        return {(t := self.network.get_output(i)).name: known[t.name] for i in range(self.network.num_outputs)}

    def _rounded(self, value, tensor):
        value = np.asarray(value)
        if tensor.dtype == getattr(self.trt.DataType, "INT4", None):
            return value
        with np.errstate(over="ignore"):
            value = value.astype(self.types[tensor.dtype])
        shape = tuple(tensor.shape)
        assert len(shape) == value.ndim, f"{tensor.name}: {shape} against {value.shape}"
        assert all(s in (-1, v) for s, v in zip(shape, value.shape, strict=True)), f"{tensor.name}: {shape} against {value.shape}"
        return value

    def _constant(self, layer):
        if layer.name not in self.constants:
            self.constants[layer.name] = self._read_constant(layer)
        return self.constants[layer.name]

    def _read_constant(self, layer):
        shape, weights = tuple(layer.shape), layer.weights
        if isinstance(weights, np.ndarray):
            return weights.reshape(shape)
        if weights.dtype == self.trt.DataType.INT4:
            raw = _bytes(weights, weights.size // 2)
            nibbles = np.stack((raw & 15, raw >> 4), axis=-1).reshape(shape).astype(np.int8)
            return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
        return _bytes(weights, weights.nbytes).view(self.types[weights.dtype]).reshape(shape)

    def _shuffle(self, layer, x):
        x = x.transpose(list(layer.first_transpose)[: x.ndim])
        dims = layer.reshape_dims
        if dims is not None and len(dims):
            x = x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(dims)])
        return x.transpose(list(layer.second_transpose)[: x.ndim])

    def _shape(self, layer, x):
        return np.array(x.shape, np.int64)

    def _slice(self, layer, x, start=None, size=None, stride=None):
        start = list(layer.start) if start is None else start.tolist()
        size = list(layer.shape) if size is None else size.tolist()
        assert all(s + n <= d for s, n, d in zip(start, size, x.shape, strict=True)), f"{layer.name} leaves its input"
        return x[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]

    def _gather(self, layer, x, index):
        limit = x.shape[layer.axis]
        assert index.min() >= 0 and index.max() < limit, f"{layer.name}: an index is outside of 0..{limit - 1}"
        if layer.num_elementwise_dims == 0:
            return np.take(x, index, axis=layer.axis)
        return np.stack([np.take(row, i, axis=layer.axis - 1) for row, i in zip(x, index, strict=True)])

    def _elementwise(self, layer, x, y):
        assert x.dtype == y.dtype, f"{layer.name} mixes {x.dtype} and {y.dtype}"
        name = layer.op.name
        if name in ("GREATER", "LESS", "AND"):
            return {"GREATER": np.greater, "LESS": np.less, "AND": np.logical_and}[name](x, y)
        wide = np.int64 if x.dtype.kind == "i" else np.float64
        functions = {
            "SUM": np.add,
            "SUB": np.subtract,
            "PROD": np.multiply,
            "DIV": np.divide,
            "MAX": np.maximum,
            "MIN": np.minimum,
        }
        return functions[name](x.astype(wide), y.astype(wide))

    def _unary(self, layer, x):
        return {"NOT": np.logical_not, "SQRT": lambda v: np.sqrt(v.astype(np.float64))}[layer.op.name](x)

    def _reduce(self, layer, x):
        assert layer.op.name == "SUM"
        axes = tuple(i for i in range(x.ndim) if layer.axes >> i & 1)
        return x.astype(np.float64).sum(axis=axes, keepdims=layer.keep_dims)

    def _activation(self, layer, x):
        x = x.astype(np.float64)
        functions = {
            "RELU": lambda v: np.maximum(v, 0),
            "SIGMOID": lambda v: 1 / (1 + np.exp(-v)),
            "GELU_ERF": lambda v: v * 0.5 * (1 + _ERF(v / math.sqrt(2))),
            "GELU_TANH": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        }
        return functions[layer.type.name](x)

    def _cast(self, layer, x):
        return x

    _identity = _cast

    def _matrix_multiply(self, layer, x, y):
        assert x.dtype == y.dtype, f"{layer.name} mixes {x.dtype} and {y.dtype}"
        turned = [v.swapaxes(-1, -2) if op.name == "TRANSPOSE" else v for v, op in ((x, layer.op0), (y, layer.op1))]
        return turned[0].astype(np.float64) @ turned[1].astype(np.float64)

    def _dequantize(self, layer, x, scale, zero=None):
        x, scale = x.astype(np.float64), scale.astype(np.float64)
        if scale.ndim == 1:
            return x * scale.reshape([-1 if i == layer.axis else 1 for i in range(x.ndim)])
        return x * np.repeat(scale, x.shape[-1] // scale.shape[-1], axis=-1)

    def _select(self, layer, condition, x, y):
        return np.where(condition, x, y)

    def _softmax(self, layer, x):
        axis = int(layer.axes).bit_length() - 1
        x = x.astype(np.float64)
        e = np.exp(x - x.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    def _concatenation(self, layer, *parts):
        return np.concatenate(parts, axis=layer.axis)

    def _rotary_embedding(self, layer, x, cos, sin, positions):
        turn = self._neighbours if layer.interleaved else self._halves
        half = cos.shape[-1]
        assert layer.rotary_embedding_dim in (0, 2 * half)
        cos, sin = (table.astype(np.float64)[positions][:, None] for table in (cos, sin))
        turned, rest = (part.astype(np.float64) for part in np.split(x, [2 * half], axis=-1))
        return np.concatenate([turn(turned, cos, sin), rest], axis=-1)

    def _halves(self, x, cos, sin):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def _neighbours(self, x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)

    def _kv_cache_update(self, layer, cache, new, write_at):
        out = cache.copy()
        for row, start in enumerate(write_at):
            assert start + new.shape[2] <= cache.shape[2], f"{layer.name} writes past the cache"
            out[row, :, start : start + new.shape[2]] = new[row]
        return out

    def _attention_input(self, layer, q, k, v, mask, *more):
        """Keeps the operands; `_attention_output` computes. Inputs 4, 5: quantisation; 6: key/value lengths."""
        lengths = more[2] if len(more) > 2 else None
        return q, k, v, mask, lengths

    def _attention_output(self, layer, operands):
        q, k, v, mask, lengths = operands
        groups = q.shape[1] // k.shape[1]
        k, v = (np.repeat(x.astype(np.float64), groups, axis=1) for x in (k, v))
        scores = q.astype(np.float64) @ k.swapaxes(-1, -2)
        visible = np.broadcast_to(mask, scores.shape)
        if lengths is not None:
            visible = visible & (np.arange(k.shape[2]) < lengths[:, None, None, None])
        scores = np.where(visible, scores, -np.inf)
        e = np.exp(scores - scores.max(-1, keepdims=True))
        return (e / e.sum(-1, keepdims=True)) @ v


def _bytes(weights, count):
    """The first `count` bytes a `trt.Weights` refers to. The binding has no accessor for types NumPy lacks, so its C++ struct
    {type, values, count} is read through the pointer that a pybind11 object holds after its header."""
    struct = ctypes.c_void_p.from_address(id(weights) + 16).value
    values = ctypes.c_void_p.from_address(struct + 8).value
    return np.ctypeslib.as_array(ctypes.cast(values, ctypes.POINTER(ctypes.c_uint8)), (count,))
