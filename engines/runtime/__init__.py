"""The serving runtime: loads an engine folder and answers requests. Needs no PyTorch."""

from .engine import Engine, load_engine
from .errors import (
    Cancelled,
    CapacityError,
    ClosedError,
    EngineFileError,
    MissingRuntimeError,
    RequestError,
    RunnerError,
    ServingError,
)
from .events import Result, Times, TokenEvent
from .guide import Guide
from .manifest import FileEntry, Manifest, ModelInfo, TargetInfo, read_manifest, verify_files, write_manifest
from .request import RequestHandle
from .runner import Runner
from .sampling import SamplingParams
from .scheduler import Scheduler
from .stats import Stats
from .text import TextStream, Tokenizer

__all__ = [
    "Cancelled",
    "CapacityError",
    "ClosedError",
    "Engine",
    "EngineFileError",
    "FileEntry",
    "Guide",
    "Manifest",
    "MissingRuntimeError",
    "ModelInfo",
    "RequestError",
    "RequestHandle",
    "Result",
    "Runner",
    "RunnerError",
    "SamplingParams",
    "Scheduler",
    "Stats",
    "ServingError",
    "TargetInfo",
    "TextStream",
    "Times",
    "TokenEvent",
    "Tokenizer",
    "load_engine",
    "read_manifest",
    "verify_files",
    "write_manifest",
]
