"""One small face of `tensorrt` 10, `tensorrt` 11 and `tensorrt_rtx`: what each has, and its errors as exceptions.

The three libraries share a network API and differ in which layers exist. `Library` asks the module itself (never a
version number) and reports mistakes where they are made: the library logs an error, returns None or an impossible
shape, and goes on. tensorrt_rtx 1.7.1 builds in this project's tests; `tensorrt` itself is contract-tested, not
executed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ngpt.errors import BuildError, UnsupportedError, missing_package
from ngpt.progress import Progress, silent

# Handles of the library's. The three libraries share no types that a checker could read: these names are for readers.
Tensor = Any
Layer = Any
Network = Any
DataType = Any

_EXTRA = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}


def load_library(name: str) -> Library:
    """The library by module name. Raises MissingPackageError naming the extra that installs it."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise missing_package(f"this target needs {name}", _EXTRA[name], found=str(error)) from error
    return Library(module)


class Library:
    """A TensorRT module, what it offers, and a log that turns into exceptions."""

    def __init__(self, module: Any) -> None:
        self.trt = module
        self.name: str = module.__name__
        self.version: str = module.__version__
        network = module.INetworkDefinition
        self.has_cache_update = hasattr(network, "add_kv_cache_update")
        self.has_rotary = hasattr(network, "add_rotary_embedding")
        self.has_attention = hasattr(network, "add_attention") or hasattr(network, "add_attention_v2")
        self.has_lengths = hasattr(network, "add_attention_v2") and hasattr(module.IAttention, "key_value_lengths")
        self.log = _logger(module)

    def dtype(self, name: str) -> DataType:
        """DataType of a type's name (float32, float16, bfloat16, int8, int4, float8_e4m3, int32).

        Raises UnsupportedError where this version has no such type.
        """
        spelled = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "float8_e4m3": "FP8"}.get(name, name.upper())
        if not hasattr(self.trt.DataType, spelled):
            raise UnsupportedError(f"{self.name} {self.version} has no data type {name}", remedy="choose another precision")
        return getattr(self.trt.DataType, spelled)

    def compute_capability(self, capability: str) -> Any:
        """The enumerator of "8.9" and the like. Raises UnsupportedError where this version cannot build for it."""
        known = getattr(self.trt, "ComputeCapability", None)
        name = "SM" + capability.replace(".", "")
        if known is None or not hasattr(known, name):
            have = ", ".join(sorted(n for n in dir(known) if n.startswith("SM"))) or "none"
            raise UnsupportedError(f"{self.name} {self.version} cannot build for {name}", expected=have, found=name)
        return getattr(known, name)

    def check(self, what: str) -> None:
        """Raise BuildError with what the library logged since the last check, if it logged an error."""
        if errors := self.log.take():
            raise BuildError(f"{self.name} refuses {what}", found=" | ".join(errors)[:2000])

    def create_network(self) -> tuple[Any, Network]:
        """(builder, strongly typed network). TensorRT 11 and RTX know no other kind; TensorRT 10 is told so."""
        builder = self.trt.Builder(self.log)
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        self.check("a new network")
        return builder, network

    def build(self, builder: Any, network: Network, config: Any, path: Path, progress: Progress = silent) -> int:
        """Build the plan into a file, streamed where the library can; returns its bytes. Raises BuildError."""
        # The library reports progress from a thread of its own and needs the interpreter's lock for it.
        config.progress_monitor = None if progress is silent else _monitor(self.trt, progress)
        with path.open("wb") as file:
            if hasattr(builder, "build_serialized_network_to_stream"):
                done = builder.build_serialized_network_to_stream(network, config, _writer(self.trt, file))
            else:
                plan = builder.build_serialized_network(network, config)
                done = plan is not None and file.write(plan) > 0
        self.check("to build the network")
        if not done:
            raise BuildError(f"{self.name} built nothing and gave no reason", remedy="build again with --debug")
        return path.stat().st_size


def _logger(module: Any) -> Any:
    class Log(module.ILogger):  # type: ignore[misc]
        """Keeps errors until they are taken. Warnings are dropped: the library warns about things that are meant."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a driver every failure is followed by a second one about CUDA, which only hides the first.
            if severity <= module.ILogger.ERROR and "CUDA driver version is insufficient" not in message:
                self._errors.append(message)

        def take(self) -> list[str]:
            errors, self._errors = self._errors, []
            return errors

    return Log()


def _writer(module: Any, file: Any) -> Any:
    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return int(file.write(data))

    return Writer()


def _monitor(module: Any, progress: Progress) -> Any:
    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        """Reports the outermost phase; inner ones would make the bar jump back and forth."""

        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = max(1, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                progress(phase, (step + 1) / self._steps[phase])
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()
