"""TEST DOUBLE of TensorRT-LLM's modules: tensorrt_llm/module.py (commit 000a01de), parameter.py (138f96d4), layers/linear.py
(03961722), layers/embedding.py (0f02b7af), mapping.py (05ebebb2); quantised linears after quantization/layers.py as
stored (no commit known), weight-only rounding after `symmetric_quantize` in cpp/.../cutlass_preprocessors.cpp (128 or
8 steps to a column's largest value).
"""

import math

import torch

from tests.doubles.tensorrt_llm_double import functional
from tests.doubles.tensorrt_llm_double.tensor import made
from tests.doubles.tensorrt_llm_double.world import DTYPES


class Parameter:
    """Has a shape and a dtype; a value of another is refused (the source warns about the dtype)."""

    def __init__(self, value=None, shape=None, dtype=None):
        assert value is None and isinstance(shape, tuple) and dtype in DTYPES
        self._shape, self.dtype, self._value = shape, dtype, None

    @property
    def value(self):
        assert self._value is not None, "a parameter without weights"
        return made(self._value)

    @value.setter
    def value(self, tensor):
        assert tuple(tensor.shape) == self._shape, f"loaded {tuple(tensor.shape)}, declared {self._shape}"
        assert tensor.dtype == DTYPES[self.dtype], f"loaded {tensor.dtype}, declared {self.dtype}"
        self._value = tensor


class Module:
    def __init__(self):
        self._modules, self._parameters, self._network_outputs = {}, {}, {}

    def forward(self, *args, **kwargs):
        raise NotImplementedError

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def __setattr__(self, name, value):
        if isinstance(value, Parameter):
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._modules[name] = value
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name):
        for table in (self.__dict__.get("_parameters", {}), self.__dict__.get("_modules", {})):
            if name in table:
                return table[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def register_parameter(self, name, param):
        assert param is None
        self._parameters[name] = None

    def register_network_output(self, name, value):
        self._network_outputs[name] = value

    def named_modules_with_parent(self, prefix="", parent=None):
        yield prefix, self, parent
        for name, child in list(self._modules.items()):
            yield from child.named_modules_with_parent(f"{prefix}.{name}".lstrip("."), self)

    def named_parameters(self):
        for prefix, module, _ in self.named_modules_with_parent():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{prefix}.{name}".lstrip("."), parameter


class ModuleList(Module):
    def __init__(self, modules):
        super().__init__()
        self._modules.update((str(i), module) for i, module in enumerate(modules))

    def __getitem__(self, index):
        return self._modules[str(index)]


class Mapping:
    def __init__(self, world_size=1, rank=0, tp_size=1, pp_size=1):
        assert world_size == tp_size * pp_size and 0 <= rank < world_size
        self.world_size, self.rank, self.tp_size, self.pp_size = world_size, rank, tp_size, pp_size

    tp_rank = property(lambda self: self.rank % self.tp_size)
    pp_rank = property(lambda self: self.rank // self.tp_size)
    tp_group = property(lambda self: [self.pp_rank * self.tp_size + i for i in range(self.tp_size)])

    def is_first_pp_rank(self):
        return self.pp_rank == 0

    def is_last_pp_rank(self):
        return self.pp_rank == self.pp_size - 1

    def prev_pp_rank(self):
        return (self.rank - self.tp_size) % self.world_size

    def next_pp_rank(self):
        return (self.rank + self.tp_size) % self.world_size

    def pp_layers(self, num_layers):
        return torch.tensor_split(torch.arange(num_layers), self.pp_size)[self.pp_rank].tolist()


class _LinearBase(Module):
    def __init__(self, local_in_features, local_out_features, bias, dtype, tp_group, tp_size):
        super().__init__()
        self.in_features, self.out_features, self.dtype = local_in_features, local_out_features, dtype
        self.tp_group, self.tp_size = tp_group, tp_size
        self.weight = Parameter(shape=(local_out_features, local_in_features), dtype=dtype)
        if bias:
            self.bias = Parameter(shape=(local_out_features,), dtype=dtype)
        else:
            self.register_parameter("bias", None)

    def product(self, x):
        return functional.matmul(x, self.weight.value, transb=True)

    def forward(self, x):
        assert x.shape[-1] == self.in_features, (x.shape, self.in_features)
        assert x.dtype == self.dtype, f"a {self.dtype} linear on {x.dtype}"
        return self.collect_and_bias(self.product(x))


class Linear(_LinearBase):
    """Column-parallel: output features divided."""

    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1, gather_output=True):
        super().__init__(in_features, out_features // tp_size, bias, dtype, tp_group, tp_size)
        self.gather_output = gather_output

    def collect_and_bias(self, x):
        if self.bias is not None:
            x = x + self.bias.value
        if self.gather_output and self.tp_size > 1 and self.tp_group is not None:
            x = functional.allgather(x, self.tp_group, gather_dim=-1)
        return x


class RowLinear(_LinearBase):
    """Row-parallel: input features divided; all-reduce, then the bias."""

    def __init__(self, in_features, out_features, bias=True, dtype=None, tp_group=None, tp_size=1):
        super().__init__(in_features // tp_size, out_features, bias, dtype, tp_group, tp_size)

    def collect_and_bias(self, x):
        if self.tp_size > 1 and self.tp_group is not None:
            x = functional.allreduce(x, self.tp_group)
        return x if self.bias is None else x + self.bias.value


class _FP8:
    """Quantise and dequantise input and weight, multiply in the layer's type (the form without the fp8 gemm plugin)."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.weight = Parameter(shape=self.weight._shape, dtype="fp8")
        self.activation_scaling_factor = Parameter(shape=(1,), dtype="float32")
        self.weights_scaling_factor = Parameter(shape=(1,), dtype="float32")

    def product(self, x):
        kind = DTYPES[self.dtype]
        scale, weight_scale = (p.value.data.to(kind) for p in (self.activation_scaling_factor, self.weights_scaling_factor))
        codes = (x.data.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        a, w = (codes.to(kind) * scale), (self.weight.value.data.to(kind) * weight_scale)
        return functional.matmul(made(a), made(w), transb=True)


class FP8Linear(_FP8, Linear):
    pass


class FP8RowLinear(_FP8, RowLinear):
    pass


class _WeightOnly:
    """The weight as the loader leaves it: `weight` here is the dequantised matrix, in place of interleaved codes."""

    def __init__(self, bits, **arguments):
        super().__init__(**arguments)
        self.per_channel_scale = Parameter(shape=(self.out_features,), dtype=self.dtype)
        self.weight = Parameter(shape=self.weight._shape, dtype="float32")

    def product(self, x):
        scale = self.per_channel_scale.value.data.float()
        return made((x.data.float() @ (self.weight.value.data * scale[:, None]).T).to(x.data.dtype))


class WeightOnlyQuantLinear(_WeightOnly, Linear):
    pass


class WeightOnlyQuantRowLinear(_WeightOnly, RowLinear):
    pass


def weight_only_codes(weight, bits):
    """(codes as float32, scale) of a [out, in] matrix, one scale an output channel."""
    steps = float(1 << (bits - 1))
    scale = (weight.float().abs().amax(1) / steps).to(weight.dtype)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return torch.round(weight.float() / safe[:, None]).clamp(-steps, steps - 1), scale


class Embedding(Module):
    def __init__(self, num_embeddings, embedding_dim, dtype=None, tp_size=1, tp_group=None, sharding_dim=0, tp_rank=None):
        super().__init__()
        assert sharding_dim == 0
        self.tp = {"tp_size": tp_size, "tp_group": tp_group, "sharding_dim": sharding_dim, "tp_rank": tp_rank}
        self.weight = Parameter(shape=(math.ceil(num_embeddings / tp_size), embedding_dim), dtype=dtype)

    def forward(self, x):
        return functional.embedding(x, self.weight.value, **self.tp)
