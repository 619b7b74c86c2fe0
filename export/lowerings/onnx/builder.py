"""An ONNX graph in the making: inputs, nodes, constants and weights by name, and the weights unread until it is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (registers the narrow dtypes onnx_ir may be asked to store)
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class GraphBuilder:
    """What a lowering adds to, node by node. `dtype` is the type that the network computes in."""

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self.nodes: list[ir.Node] = []
        self.values: dict[str, ir.Value] = {}
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[ir.Value] = []

    def _input(self, name: str, shape: list[str | int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs[name] = self.values[name] = value
        return value

    def _node(self, op: str, inputs: Sequence[ir.Value | None], name: str, domain: str = "", **attributes: Any) -> ir.Value:
        return self._nodes(op, inputs, [name], domain, **attributes)[0]

    def _nodes(
        self, op: str, inputs: Sequence[ir.Value | None], names: Sequence[str], domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        for key, value in attributes.items():
            if isinstance(value, ir.DataType):
                attributes[key] = int(value)
        outputs = [ir.Value(name=name) for name in names]
        self.nodes.append(ir.node(op, inputs, attributes, domain=domain, outputs=outputs, name=f"{names[0]}/{op}"))
        self.values.update({str(value.name): value for value in outputs})
        return outputs

    def _constant(self, name: str, array: NDArray[Any], *, wide: bool = False) -> ir.Value:
        """A small tensor, stored once under its name; floating ones in the network's dtype unless `wide`."""
        key = f"const.{name}"
        if key not in self.initializers:
            if array.dtype.kind == "f" and self.dtype == ir.DataType.FLOAT16 and not wide:
                array = array.astype(np.float16)
            value = ir.Value(name=key, const_value=ir.tensor(array, name=key))
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), ir.Shape(array.shape)
            self.initializers[key] = value
        return self.initializers[key]

    def _weight(
        self,
        name: str,
        load: Callable[[], NDArray[Any]],
        shape: Sequence[int],
        *,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A tensor that is read, folded and written only when the graph is saved, and not kept afterwards."""
        if name not in self.initializers:
            kind = dtype or self.dtype
            numpy_dtype = kind.numpy()

            def evaluate() -> ir.Tensor:
                return ir.tensor(np.ascontiguousarray(load().astype(numpy_dtype, copy=False)), dtype=kind, name=name)

            tensor = ir.LazyTensor(evaluate, dtype=kind, shape=ir.Shape(shape), name=name, cache=False)
            value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(kind), shape=ir.Shape(shape))
            self.initializers[name] = value
        return self.initializers[name]
