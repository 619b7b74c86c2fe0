"""TEST DOUBLE of TensorRT's builder, as far as plugins written in Python meet it.

What is real: the Python files of `tensorrt.plugin` (from the tensorrt-cu13-bindings wheel: decorators, validators, creators,
shape expressions), and NVIDIA's binary module of tensorrt_rtx, which has the same types, plugin registry and networks.
What is a double, because the one binary lacks it or does not let Python make it: expressions over dimensions (here plain
integers, evaluated at once), the three types of ahead-of-time plugins, and `add_plugin`, which calls a plugin's methods in the
order and with the arguments the builder does. Nothing is built or run.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import tensorrt_rtx


class IDimensionExpr:
    def __init__(self, value):
        self.value = int(value)

    def is_constant(self):
        return True

    def get_constant_value(self):
        return self.value


class ExprBuilder:
    def constant(self, value):
        return IDimensionExpr(value)

    def operation(self, op, a, b):
        kind = tensorrt_rtx.DimensionOperation
        work = {
            kind.SUM: lambda x, y: x + y, kind.SUB: lambda x, y: x - y, kind.PROD: lambda x, y: x * y,
            kind.FLOOR_DIV: lambda x, y: x // y, kind.CEIL_DIV: lambda x, y: -(-x // y),
        }  # fmt: skip
        return IDimensionExpr(work[op](a.value, b.value))


class DimsExprs(list):
    def __init__(self, size):
        super().__init__([None] * size)


class ISymExpr:
    pass


class IPluginV3QuickAOTBuild:
    def __init__(self):
        pass


class QuickPluginCreationRequest:
    UNKNOWN, PREFER_JIT, PREFER_AOT, STRICT_JIT, STRICT_AOT = range(5)


class SymExprSetter(list):
    """ISymExprs: `nbSymExprs` sizes it."""

    def __setattr__(self, name, value):
        self[:] = [None] * value if name == "nbSymExprs" else self[:]


def install(plugin_folder: Path, monkeypatch) -> ModuleType:
    """Make `tensorrt` and `tensorrt.plugin` importable; `plugin_folder` holds the latter's own files."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
        monkeypatch.delitem(sys.modules, name)
    module = ModuleType("tensorrt")
    module.__path__ = []
    module.__dict__.update({name: value for name, value in vars(tensorrt_rtx).items() if not name.startswith("__")})
    doubles = (IDimensionExpr, DimsExprs, ISymExpr, IPluginV3QuickAOTBuild, QuickPluginCreationRequest)
    module.__dict__.update({double.__name__: double for double in doubles}, __version__="a double")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", plugin_folder / "__init__.py", submodule_search_locations=[str(plugin_folder)]
    )
    plugin = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    module.plugin = plugin
    spec.loader.exec_module(plugin)
    return module


class Network:
    """Inputs are ITensors of a real tensorrt_rtx network; `shapes` gives their dimensions at run time by name."""

    def __init__(self, trt, shapes):
        self.trt, self.shapes = trt, shapes
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._builder = trt.Builder(self._logger)
        self._network = self._builder.create_network(0)
        self.layers = []

    def add_input(self, name, dtype, shape):
        return self._network.add_input(name, dtype, shape)

    def add_plugin(self, call, aot):
        assert aot
        inputs, shape_inputs, plugin = call(QuickPluginCreationRequest.STRICT_AOT)
        assert not shape_inputs
        layer = self._build(inputs, plugin)
        self.layers.append(layer)
        return layer

    def _build(self, inputs, plugin):
        builder = ExprBuilder()
        dims = [self.shapes[tensor.name] for tensor in inputs]
        types = plugin.get_output_data_types([tensor.dtype for tensor in inputs], [len(shape) for shape in dims])
        exprs = [self._exprs(shape) for shape in dims]
        outputs = plugin.get_output_shapes(exprs, [], builder)
        out_dims = [tuple(expr.value for expr in output) for output in outputs]
        everything = [tensor.dtype for tensor in inputs] + list(types)
        descs = [self._desc(kind, shape) for kind, shape in zip(everything, [*dims, *out_dims], strict=True)]
        combinations = plugin.get_supported_format_combinations(descs, len(inputs))
        assert len(combinations) % len(descs) == 0
        rows = [combinations[i : i + len(descs)] for i in range(0, len(combinations), len(descs))]
        chosen = [row for row in rows if [desc.type for desc in row] == everything]
        assert chosen, "no combination takes the network's types"
        plugin.configure_plugin(descs[: len(inputs)], descs[len(inputs) :])
        assert plugin.get_valid_tactics() == []
        plugin.set_tactic(0)
        launch, integers = SimpleNamespace(), SymExprSetter()
        plugin.get_launch_params(exprs, descs, len(inputs), launch, integers, builder)
        name, ptx = plugin.get_kernel([d.desc for d in descs[: len(inputs)]], [d.desc for d in descs[len(inputs) :]])
        evaluated = {key: value.expr.value for key, value in vars(launch).items()}
        return Layer(name, ptx, evaluated, [(i.dtype, i.expr.value) for i in integers], types, out_dims, combinations)

    def _exprs(self, shape):
        exprs = DimsExprs(len(shape))
        exprs[:] = map(IDimensionExpr, shape)
        return exprs

    def _desc(self, kind, shape):
        described = self.trt.DynamicPluginTensorDesc()
        inner = self.trt.PluginTensorDesc()
        inner.dims, inner.type, inner.format, inner.scale = shape, kind, self.trt.TensorFormat.LINEAR, 1.0
        described.desc, described.min, described.max = inner, shape, shape
        return described


class Layer:
    def __init__(self, name, ptx, launch, integers, types, shapes, combinations):
        self.name, self.ptx, self.launch, self.integers = name, ptx, launch, integers
        self.combinations = combinations
        self._outputs = [SimpleNamespace(dtype=kind, shape=shape) for kind, shape in zip(types, shapes, strict=True)]

    def get_output(self, index):
        return self._outputs[index]
