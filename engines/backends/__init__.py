"""One door per runtime: `backend_of` finds it, `register` adds a runtime from outside."""

from __future__ import annotations

from engines.backends.onnx import OnnxBackend
from engines.backends.protocol import Backend, Job, StoredRows, TapFunction, Written
from engines.backends.tensorrt import TensorRTBackend
from engines.backends.tensorrt_llm import TensorRTLLMBackend
from engines.runtimes import RUNTIMES, runtime_of
from ngpt.errors import TargetError

__all__ = ["Backend", "Job", "StoredRows", "TapFunction", "Written", "backend_of", "register"]

_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Make a runtime known: targets may name it, and engines are built through `backend`. Raises TargetError for a name that
    is taken.

    To run its engines here, register a runner too (`engines.runtime.engine.register_runner`).
    """
    name = backend.runtime.name
    if name in _BACKENDS:
        raise TargetError(f"the runtime {name}", expected="a name of its own", found="a backend of this name")
    _BACKENDS[name] = backend
    RUNTIMES[name] = backend.runtime


def backend_of(runtime: str) -> Backend:
    """The backend of a runtime's name. Raises TargetError listing the runtimes there are."""
    return _BACKENDS[runtime_of(runtime).name]


for _backend in (OnnxBackend(), TensorRTBackend("tensorrt"), TensorRTBackend("tensorrt_rtx"), TensorRTLLMBackend()):
    register(_backend)
