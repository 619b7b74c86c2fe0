"""TEST DOUBLE of `tensorrt_llm.functional.Tensor` (tensorrt_llm/functional.py, commit 00714966), holding its value in `data`."""

from collections import OrderedDict
from types import SimpleNamespace

import torch

from tests.doubles.tensorrt_llm_double.world import DTYPES, default_net


class Tensor:
    """Dtypes are names. A network input takes its value from the network's feeds, and must fit the shape and ranges declared."""

    def __init__(self, name=None, dtype=None, shape=None, dim_range=None, is_network_input=True, data=None):
        self.name = name
        if not is_network_input:
            self.data = data
            return
        assert isinstance(dtype, str) and dtype in DTYPES, f"input {name}: unknown dtype {dtype!r}"
        assert dim_range is None or isinstance(dim_range, OrderedDict)
        net = default_net()
        assert name not in net.inputs, f"input {name} is declared twice"
        assert name in net.feeds, f"the runtime sets no input {name}"
        net.inputs[name] = self
        self.data = net.feeds[name]
        self.profiles = []
        if dim_range is not None:
            assert len(dim_range) == len(shape), f"input {name}: {len(shape)} axes, {len(dim_range)} ranges"
            for index in range(len(next(iter(dim_range.values())))):
                rows = [ranges[index] for ranges in dim_range.values()]
                rows = [[r, r, r] if isinstance(r, int) else r for r in rows]
                low, usual, high = zip(*rows, strict=True)
                self.profiles.append(SimpleNamespace(min=list(low), opt=list(usual), max=list(high)))
        assert self.data.dtype == DTYPES[dtype], f"input {name}: {dtype} declared, {self.data.dtype} fed"
        found = tuple(self.data.shape)
        assert len(found) == len(shape), f"input {name}: declared {shape}, fed {found}"
        assert all(a in (-1, b) for a, b in zip(shape, found, strict=True)), f"input {name}: declared {shape}, fed {found}"
        for profile in self.profiles[:1]:
            assert all(low <= size <= high for low, size, high in zip(profile.min, found, profile.max, strict=True)), name

    @property
    def dtype(self):
        return next(name for name, kind in DTYPES.items() if kind == self.data.dtype)

    @property
    def trt_tensor(self):
        """The ITensor: here the value itself."""
        return self.data

    @property
    def shape(self):
        return tuple(self.data.shape)

    def ndim(self):
        return self.data.ndim

    def size(self, dim=None):
        return self.shape if dim is None else self.shape[dim]

    def mark_output(self, name=None, dtype=None):
        outputs = default_net().outputs
        assert name not in outputs, f"output {name} is marked twice"
        # A strongly typed network casts nothing at its outputs on its own; logits are cast where TensorRT-LLM marks them.
        outputs[name] = self.data.to(DTYPES[dtype])

    def _with(self, other, function, reverse=False):
        a, b = (other, self) if reverse else (self, other)
        return binary(a, b, function)

    def __add__(self, b):
        return self._with(b, torch.add)

    def __radd__(self, b):
        return self._with(b, torch.add, True)

    def __sub__(self, b):
        return self._with(b, torch.sub)

    def __mul__(self, b):
        return self._with(b, torch.mul)

    def __rmul__(self, b):
        return self._with(b, torch.mul, True)

    def __truediv__(self, b):
        return self._with(b, torch.div)


def made(data, name=None):
    """The tensor of a layer's output."""
    return Tensor(name=name, is_network_input=False, data=data)


def binary(left, right, function):
    """`elementwise_binary` of a strongly typed network: numbers take the other's type, tensors must agree, ranks grow on the left."""
    assert isinstance(left, Tensor) or isinstance(right, Tensor)
    kind = left.data.dtype if isinstance(left, Tensor) else right.data.dtype
    a, b = (x.data if isinstance(x, Tensor) else torch.tensor([x], dtype=kind) for x in (left, right))
    assert a.dtype == b.dtype, f"elementwise operation on {a.dtype} and {b.dtype}"
    rank = max(a.ndim, b.ndim)
    a, b = (x.reshape((1,) * (rank - x.ndim) + x.shape) for x in (a, b))
    return made(function(a, b))
