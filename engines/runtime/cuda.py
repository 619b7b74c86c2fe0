"""Device memory, pinned host memory and one stream, through the official `cuda-bindings` package.

Contract-tested; not executed on a GPU.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import MissingRuntimeError, RunnerError

Bytes = NDArray[np.uint8]
_device = 0


def use_device(number: int) -> None:
    """Open what this thread opens next on this GPU, counted from 0. Raises as `Cuda`."""
    global _device
    runtime = _library()
    if int(code := runtime.cudaSetDevice(number)[0]):
        raise RunnerError(f"GPU {number} cannot be used", expected="one that this machine has", found=f"CUDA's error {int(code)}")
    _device = number


def chosen_device() -> int:
    """The number that `use_device` was given last; 0 before."""
    return _device


def _library() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingRuntimeError(
            "the library cuda-bindings",
            expected="installed",
            found="not installed",
            remedy="Run: pip install 'cuda-bindings>=13'",
        ) from error


class Cuda:
    """One non-blocking stream of the current device, and all memory allocated through it until `release`.

    Device memory is named by its address. Copies and kernels run in the order they were queued, after the call returns: a host
    buffer may be read or written again only after `synchronize`. Raises MissingRuntimeError without cuda-bindings, RunnerError
    for any error that CUDA reports.
    """

    def __init__(self) -> None:
        self._runtime: Any = _library()
        self._device: list[int] = []
        self._host: list[int] = []
        self._stream: Any = None
        kinds = self._runtime.cudaMemcpyKind
        self._up, self._down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._across = kinds.cudaMemcpyDeviceToDevice
        self._thread = threading.get_ident()
        (self.device,) = self._call("cudaGetDevice")
        (self._stream,) = self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The stream's handle, for libraries that queue work on it."""
        return int(self._stream)

    def compute_capability(self) -> str:
        """Of the current device, like "12.0"."""
        kinds = self._runtime.cudaDeviceAttr
        attributes = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        major, minor = (self._call("cudaDeviceGetAttribute", attribute, self.device)[0] for attribute in attributes)
        return f"{major}.{minor}"

    def free_memory(self) -> int:
        """Bytes of device memory that are free now."""
        return int(self._call("cudaMemGetInfo")[0])

    def allocate(self, size: int) -> int:
        """Address of `size` bytes of device memory, aligned to at least 256, of unknown content."""
        (address,) = self._call("cudaMalloc", size)
        self._device.append(int(address))
        return int(address)

    def pinned(self, size: int) -> Bytes:
        """uint8 [size] in host memory that the device reads and writes while the host goes on."""
        (address,) = self._call("cudaMallocHost", size)
        self._host.append(int(address))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address)))

    def zero(self, address: int, size: int) -> None:
        """Queue zeros for `size` bytes of device memory."""
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def upload(self, target: int, source: Bytes) -> None:
        """Queue a copy of a pinned buffer to device memory."""
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, self._up, self._stream)

    def download(self, target: Bytes, source: int) -> None:
        """Queue a copy of device memory to a pinned buffer."""
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, self._down, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Queue a copy within device memory."""
        self._call("cudaMemcpyAsync", target, source, size, self._across, self._stream)

    def copy_rows(self, target: int, source: int, *, pitch: int, width: int, height: int) -> None:
        """Queue a copy of the first `width` bytes of each of `height` rows that lie `pitch` bytes apart on both sides."""
        self._call("cudaMemcpy2DAsync", target, pitch, source, pitch, width, height, self._across, self._stream)

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        self._call("cudaStreamSynchronize", self._stream)

    def release(self) -> None:
        """Wait, then free everything. Calling it twice is harmless.

        Error codes are ignored here: after a failed kernel every call repeats the error that another call has raised.
        """
        if self._stream is None:
            return
        self._use_device()
        stream, self._stream = self._stream, None
        device, self._device, host, self._host = self._device, [], self._host, []
        self._runtime.cudaStreamSynchronize(stream)
        for address in device:
            self._runtime.cudaFree(address)
        for address in host:
            self._runtime.cudaFreeHost(address)
        self._runtime.cudaStreamDestroy(stream)

    def _use_device(self) -> None:
        """The device that was current where this object was made, in whichever thread calls now: CUDA keeps it by thread."""
        if self._thread != threading.get_ident():
            self._thread = threading.get_ident()
            self._runtime.cudaSetDevice(self.device)

    def _call(self, name: str, *args: Any) -> tuple[Any, ...]:
        """The values a CUDA runtime function returns beside its error code."""
        self._use_device()
        code, *values = getattr(self._runtime, name)(*args)
        codes = self._runtime.cudaError_t
        if code == codes.cudaSuccess:
            return tuple(values)
        remedy = "Run it on a machine with an NVIDIA GPU and a driver that this CUDA version supports."
        if code == codes.cudaErrorMemoryAllocation:
            remedy = "Free device memory, or serve with fewer slots."
        _, text = self._runtime.cudaGetErrorString(code)
        reason = text.decode() if isinstance(text, bytes) else str(text)
        raise RunnerError(f"CUDA's {name} failed", found=f"{reason} ({int(code)})", remedy=remedy)
