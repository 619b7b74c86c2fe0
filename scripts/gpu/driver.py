"""Loads PTX and launches it as TensorRT does: through the driver API, arguments in the order of the kernel's parameters.

cuda-bindings where it is installed, ctypes on libcuda elsewhere. The packing is tested on the CPU; the calls themselves have
not been executed on a CUDA device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

from export.plugins.kernels import Kernel


class Driver(Protocol):
    """The three calls of the driver API that a launch needs. All raise RuntimeError with the driver's own name of the error."""

    def function(self, ptx: bytes, name: bytes) -> Any:
        """Handle of an entry of `ptx`, loaded into the current context."""

    def launch(self, function: Any, grid: int, block: tuple[int, int], stream: int, addresses: Any) -> None:
        """Launch; `addresses` is a C array of pointers to the arguments."""


class Bindings:
    """cuda.bindings.driver."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self._api = driver
        self._check(driver.cuInit(0))

    def _check(self, result: tuple[Any, ...]) -> Any:
        status, *rest = result
        if status != self._api.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA driver: {status.name}")
        return rest[0] if rest else None

    def function(self, ptx: bytes, name: bytes) -> Any:
        module = self._check(self._api.cuModuleLoadData(ptx))
        return self._check(self._api.cuModuleGetFunction(module, name))

    def launch(self, function: Any, grid: int, block: tuple[int, int], stream: int, addresses: Any) -> None:
        where = ctypes.addressof(addresses)
        self._check(self._api.cuLaunchKernel(function, grid, 1, 1, *block, 1, 0, stream, where, 0))


class Library:
    """libcuda through ctypes."""

    def __init__(self) -> None:
        self._api = ctypes.CDLL("libcuda.so.1")
        self._check(self._api.cuInit(0))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._api.cuGetErrorName(status, ctypes.byref(text))
            raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()}")

    def function(self, ptx: bytes, name: bytes) -> Any:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._api.cuModuleLoadData(ctypes.byref(module), ctypes.c_char_p(ptx)))
        self._check(self._api.cuModuleGetFunction(ctypes.byref(function), module, ctypes.c_char_p(name)))
        return function

    def launch(self, function: Any, grid: int, block: tuple[int, int], stream: int, addresses: Any) -> None:
        self._check(self._api.cuLaunchKernel(function, grid, 1, 1, *block, 1, 0, ctypes.c_void_p(stream), addresses, None))


def drivers() -> dict[str, Driver]:
    """Those that work here, by name. Empty on a machine without a driver."""
    found: dict[str, Driver] = {}
    for name, make in (("cuda-bindings", Bindings), ("ctypes", Library)):
        try:
            found[name] = make()
        except (ImportError, OSError, RuntimeError):
            continue
    return found


def pack(kernel: Kernel, arguments: Sequence[int]) -> tuple[Any, list[Any]]:
    """(C array of addresses, the values they point to) for device addresses and integers in the order of the parameters."""
    kinds: dict[str, Any] = {"u64": ctypes.c_uint64, "u32": ctypes.c_int32}
    values = [kinds[kind](argument) for kind, argument in zip(kernel.parameters, arguments, strict=True)]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return addresses, values


class Launcher:
    """A compiled kernel: `launcher(count, *arguments)` with tensors and ints in the order of its parameters."""

    def __init__(self, driver: Driver, kernel: Kernel, ptx: str) -> None:
        self.kernel, self._driver = kernel, driver
        self._function = driver.function(ptx.encode() + b"\0", kernel.name.encode() + b"\0")

    def __call__(self, count: int, *arguments: Any) -> None:
        """Launch over `count` rows or tokens on torch's current stream; the caller keeps the tensors alive.

        Raises ValueError for a tensor that is not contiguous: the kernel would read something else.
        """
        import torch

        if not all(isinstance(value, int) or value.is_contiguous() for value in arguments):
            raise ValueError(f"{self.kernel.name} takes contiguous tensors")
        plain = [value if isinstance(value, int) else value.data_ptr() for value in arguments]
        addresses, _values = pack(self.kernel, plain)
        stream = torch.cuda.current_stream().cuda_stream
        self._driver.launch(self._function, self.kernel.grid(count), self.kernel.block, stream, addresses)
