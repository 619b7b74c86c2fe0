"""Building blocks of the TensorRT lowering: named layers that are checked as they are made, constants, products, slices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.lowerings.base import Lowering
from export.lowerings.tensorrt.library import DataType, Layer, Library, Network, Tensor
from export.lowerings.tensorrt.weights_file import WeightsFile
from export.precision import TENSORRT, Precision
from export.quantize import rounded
from export.weights import DeployedWeights
from ngpt.errors import UnsupportedError
from ngpt.progress import Progress, silent


class TensorRTLayers(Lowering[Tensor]):
    """What every operation here is made of. Raises BuildError with the library's own reason where it refuses a layer."""

    def __init__(
        self,
        weights: DeployedWeights,
        library: Library,
        network: Network,
        scratch: WeightsFile,
        precision: Precision = TENSORRT["fp16"],
        progress: Progress = silent,
        architecture: int = 80,
    ) -> None:
        """`network` is empty. `architecture`: the compute capability plugins are compiled for, in tens and units (90 is 9.0)."""
        super().__init__(weights)
        self.library, self.trt, self.network, self.scratch = library, library.trt, network, scratch
        self.precision, self.progress, self.architecture = precision, progress, architecture
        self.float32, self.int32 = library.dtype("float32"), library.dtype("int32")
        self.stored = library.dtype(precision.arithmetic)
        library.dtype(precision.projections.code)  # refused by name before any work
        self.values: dict[str, Tensor] = {}
        self.prepare()

    def prepare(self) -> None:
        """The network's inputs, and what all layers share."""

    def input(self, name: str, dtype: DataType, shape: tuple[int, ...]) -> Tensor:
        tensor = self.network.add_input(name, dtype, shape)
        self.library.check(f"the input {name}")
        self.values[name] = tensor
        return tensor

    def made(self, name: str, layer: Layer) -> Layer:
        """A new layer, or BuildError with the library's reason."""
        self.library.check(f"the layer {name}")
        return layer

    def out(self, name: str, layer: Layer) -> Tensor:
        """The named output of a layer; asking for its shape makes the library check the layer now."""
        self.made(name, layer).name = name
        tensor = layer.get_output(0)
        tensor.name = name
        with contextlib.suppress(RuntimeError):  # an impossible shape; the log says why
            len(tensor.shape)
        self.library.check(f"the layer {name}")
        self.values[name] = tensor
        return tensor

    def named(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor that somebody else's layer made, under the network's own name."""
        tensor.name = name
        self.library.check(f"the tensor {name}")
        self.values[name] = tensor
        return tensor

    def constant(self, name: str, array: NDArray[Any], dtype: DataType = None, shape: Sequence[int] | None = None) -> Tensor:
        """A constant; `dtype` and `shape` where they are not the array's own (bfloat16, 4-bit). Same name, same constant."""
        if name not in self.values:
            array = self.scratch.add(np.ascontiguousarray(array))
            shape = tuple(array.shape if shape is None else shape)
            kind = dtype or {"f": self.float32, "i": self.int32}[array.dtype.kind]
            weights = self.trt.Weights(kind, array.ctypes.data, int(np.prod(shape)))
            self.out(name, self.network.add_constant(shape, weights))
        return self.values[name]

    def weight(self, name: str, load: Callable[[], NDArray[np.float32]], shape: Sequence[int]) -> Tensor:
        """A tensor in the stored type."""
        if name not in self.values:
            return self.constant(name, rounded(load(), self.precision.arithmetic), self.stored, shape)
        return self.values[name]

    def scalar(self, name: str, value: float, rank: int) -> Tensor:
        return self.constant(name, np.full((1,) * rank, value, np.float32))

    def cast(self, name: str, x: Tensor, dtype: DataType, *, always: bool = False) -> Tensor:
        if x.dtype == dtype and not always:
            return x
        if x.dtype == dtype:
            return self.out(name, self.network.add_identity(x))
        return self.out(name, self.network.add_cast(x, dtype))

    def wide(self, name: str, x: Tensor) -> Tensor:
        return self.cast(name, x, self.float32)

    def narrow(self, name: str, x: Tensor) -> Tensor:
        return self.cast(name, x, self.stored)

    def binary(self, name: str, x: Tensor, y: Tensor, operation: Any) -> Tensor:
        """Elementwise; where the types differ, in float32."""
        if x.dtype != y.dtype:
            x, y = self.wide(f"{name}.x", x), self.wide(f"{name}.y", y)
        return self.out(name, self.network.add_elementwise(x, y, operation))

    def reshape(
        self,
        name: str,
        x: Tensor,
        shape: Sequence[int] | None,
        then: Sequence[int] | None = None,
        first: Sequence[int] | None = None,
    ) -> Tensor:
        """Transpose (`first`), reshape (0 keeps a dimension, -1 is inferred), transpose (`then`): one layer."""
        if name in self.values:
            return self.values[name]
        layer = self.made(name, self.network.add_shuffle(x))
        if first is not None:
            layer.first_transpose = tuple(first)
        if shape is not None:
            layer.reshape_dims = tuple(shape)
        if then is not None:
            layer.second_transpose = tuple(then)
        return self.out(name, layer)

    def slice(self, name: str, x: Tensor, start: tuple[int, ...], fixed: tuple[int, ...]) -> Tensor:
        """Part of x [B, *, S, *]; `fixed` states the sizes with 0 for B and S, which are known at run time only."""
        size = self.size(x, fixed)
        layer = self.network.add_slice(x, start, (0,) * len(start), (1,) * len(start))
        self.made(name, layer).set_input(2, size)
        return self.out(name, layer)

    def size(self, x: Tensor, fixed: tuple[int, ...]) -> Tensor:
        """`fixed` with B and S filled in as a shape tensor. Every tensor has the same two, so one per `fixed` serves all."""
        name = "size." + "x".join(map(str, fixed))
        if name not in self.values:
            shape = self.out(f"{name}.shape", self.network.add_shape(x))
            keep = self.constant64(f"{name}.keep", [int(f == 0) for f in fixed])
            kept = self.binary(f"{name}.kept", shape, keep, self.trt.ElementWiseOperation.PROD)
            self.binary(name, kept, self.constant64(f"{name}.fixed", list(fixed)), self.trt.ElementWiseOperation.SUM)
        return self.values[name]

    def constant64(self, name: str, values: list[int]) -> Tensor:
        return self.constant(name, np.array(values, np.int64), self.trt.DataType.INT64)

    def heads(self, name: str, x: Tensor, start: int, count: int) -> Tensor:
        return self.slice(name, x, (0, start, 0, 0), (0, count, 0, self.spec.head_dim))

    def channels(self, name: str, x: Tensor, start: int, count: int) -> Tensor:
        return self.slice(name, x, (0, 0, 0, start), (0, int(x.shape[1]), 0, count))

    def matmul(self, name: str, x: Tensor, parts: Sequence[str]) -> Tensor:
        """x times the stacked matrices of `parts` (transposed), plus their stacked biases."""
        layer = name.split(".")[1] if "." in name else str(self.spec.num_layers)
        self.progress(f"reading {name}", int(layer) / (self.spec.num_layers + 1))
        columns = self.weights.shape(f"{parts[0]}.weight")[1]
        rows = sum(self.weights.shape(f"{part}.weight")[0] for part in parts)
        lead = (1,) * (len(x.shape) - 2)
        matrix = self.matrix(f"{name}.weight", lambda: self.stack(parts, "weight"), rows, columns)
        if lead:
            matrix = self.reshape(f"{name}.weight.batched", matrix, (*lead, rows, columns))
        operation = self.trt.MatrixOperation
        x = self.narrow(f"{name}.input", x)
        product = self.network.add_matrix_multiply(x, operation.NONE, matrix, operation.TRANSPOSE)
        if not self.weights.has(f"{parts[0]}.bias"):
            return self.out(name, product)
        bias = self.weight(f"{name}.bias", lambda: self.stack(parts, "bias"), (*lead, 1, rows))
        return self.add(name, self.out(f"{name}.product", product), bias)

    def stack(self, parts: Sequence[str], kind: str) -> NDArray[np.float32]:
        return np.concatenate([self.weights.get(f"{part}.{kind}") for part in parts])

    def matrix(self, name: str, load: Callable[[], NDArray[np.float32]], rows: int, columns: int) -> Tensor:
        """A weight matrix [rows, columns] in the stored type, dequantised in the network where it is stored narrower."""
        stored = self.precision.format_of(name)
        if stored.plain:
            return self.weight(name, load, (rows, columns))
        if columns % stored.block_of(columns) and stored.code == "int4":
            raise UnsupportedError(f"int4: columns of {name}", expected=f"a multiple of {stored.block}", found=str(columns))
        quantized, dtype = stored.quantize(load()), self.library.dtype(stored.code)
        if stored.code == "float8_e4m3":
            data = self.constant(f"{name}.data", quantized.data, dtype)
        elif stored.code == "int8":
            data = self.constant(f"{name}.data", quantized.codes()[:, :columns].astype(np.int8), dtype)
        elif stored.code == "int4":
            # Two's complement instead of an offset of 8: flip each nibble's highest bit.
            packed = (quantized.data ^ np.uint8(0x88)).reshape(rows, columns // 2)
            data = self.constant(f"{name}.data", packed, dtype, (rows, columns))
        else:
            raise UnsupportedError("format of weights in TensorRT", expected="int8, int4 or float8_e4m3", found=str(stored))
        scale = quantized.scales if stored.block else quantized.scales[:, 0]
        factors = self.weight(f"{name}.scales", lambda: scale, scale.shape)
        layer = self.network.add_dequantize(data, factors, self.stored)
        if len(scale.shape) == 1:
            self.made(name, layer).axis = 0
        return self.out(name, layer)
