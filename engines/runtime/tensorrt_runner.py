"""Runs a TensorRT or TensorRT-RTX plan for the scheduler: many sequences, each in a row of one key-value cache.

The plan has two optimisation profiles, 0 for reading one prompt and 1 for a decode step of several sequences, and takes
int32 input_ids and position_ids [B, S], lengths and write_at [B], logit_rows [R] beside the cache; it returns logits float32
[R, V]. The plan's reader and the device are told apart from the rest: `Plan` is TensorRT's side, `Cuda` the memory.

Contract-tested; not executed on a GPU.
"""

from __future__ import annotations

import importlib
import mmap
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .compatibility import PACKAGES, check_slots, flag, problems, row_bytes
from .cuda import Cuda
from .errors import ClosedError, EngineFileError, MissingRuntimeError, RunnerError
from .slots import Slots

if TYPE_CHECKING:
    from .manifest import Manifest

Logits = NDArray[np.float32]
PREFILL, DECODE = 0, 1
INPUTS = ("input_ids", "position_ids", "lengths", "write_at", "logit_rows")


class TensorRTRunner:
    """The `Runner` protocol over a TensorRT plan. Not thread-safe: the scheduler is its one caller.

    Raises EngineFileError when the plan cannot run here or is not what the manifest says, MissingRuntimeError without the
    library, RunnerError when CUDA or TensorRT fails. `threads` means nothing to it.
    """

    def __init__(self, folder: Path, manifest: Manifest, num_slots: int, threads: int | None = None) -> None:
        check_slots(manifest, num_slots)
        model, runtime = manifest.model, manifest.target.runtime
        library = _library(runtime)
        self.vocab_size, self.max_length, self.num_slots = model.vocab_size, model.max_length, num_slots
        self.prefill_tokens = flag(manifest, "prefill_tokens")
        self._slots = Slots(num_slots, self.max_length)
        self._plan: Plan | None = None
        self._cuda = Cuda()
        try:
            for problem in problems(
                manifest,
                tensorrt_version=str(library.__version__),
                compute_capability=self._cuda.compute_capability(),
                memory_bytes=self._cuda.free_memory(),
            ):
                raise problem
            self._plan = Plan(library, folder / manifest.graph, manifest, self._cuda.stream)
            self._cache = _Cache(self._cuda, manifest, num_slots)
            most = max(self.prefill_tokens, num_slots)
            self._inputs = _Inputs(self._cuda, most)
            self._logits = self._cuda.allocate(most * self.vocab_size * 4)
            self._fetched = self._cuda.pinned(num_slots * self.vocab_size * 4)
        except BaseException:
            self.release()
            raise

    def open(self) -> int:
        """Take a free slot with an empty cache. Raises CapacityError when all are taken."""
        return self._slots.open()

    def close(self, slot: int) -> None:
        """Give the slot back. The last row moves into the hole, so that the rows in use stay one block."""
        self._slots.close(slot, self._cache.move)

    def release(self) -> None:
        """Free the plan's contexts, then the device's memory. Calling it twice is harmless."""
        try:
            if self._plan is not None:
                self._cuda.synchronize()
        finally:
            self._plan = None
            self._cuda.release()

    def prefill(self, slot: int, tokens: NDArray[np.int64], *, all_logits: bool = False) -> Logits:
        """Append int64 [T] to the slot, `prefill_tokens` at a time: logits [V] of the last token, or [T, V].

        Raises CapacityError past max_length.
        """
        row = self._slots.row(slot)
        self._slots.check_room(row, len(tokens))
        parts: list[Logits] = []
        for begin in range(0, len(tokens), self.prefill_tokens):
            ids = np.asarray(tokens[begin : begin + self.prefill_tokens])[None]
            last = begin + ids.shape[1] == len(tokens)
            wanted = np.arange(ids.shape[1]) if all_logits else np.array([ids.shape[1] - 1])
            parts.append(
                self._step(
                    PREFILL, row, ids, self._slots.lengths[row : row + 1], wanted, len(wanted) if last or all_logits else 0
                )
            )
            self._slots.lengths[row] += ids.shape[1]
        return np.concatenate(parts) if all_logits else parts[-1][-1]

    def decode(self, slots: Sequence[int], tokens: NDArray[np.int64]) -> Logits:
        """Append one token to each slot: logits [n, V]. Raises CapacityError past max_length."""
        block = self._slots.block(slots)
        ids = np.zeros((block.size, 1), np.int64)
        ids[block.offsets, 0] = tokens
        # The rows asked for come first, in their order, so that what is copied back is one piece and all of it wanted.
        wanted = np.concatenate([block.offsets, np.setdiff1d(np.arange(block.size), block.offsets)])
        logits = self._step(DECODE, block.first, ids, block.starts, wanted, len(slots))
        self._slots.lengths[block.first + block.offsets] += 1
        return logits

    def _step(
        self, profile: int, first: int, ids: NDArray[np.int64], starts: NDArray[np.int64], wanted: NDArray[np.int64], keep: int
    ) -> Logits:
        """One run over the rows [first, first + B) with ids [B, S] at positions from starts [B]: the first `keep` rows of
        the `wanted` tokens' logits, float32 [keep, V]."""
        if self._plan is None:
            raise ClosedError("the runner was released", remedy="Load the engine again.")
        batch, count = ids.shape
        context = self._plan.contexts[profile]
        positions = starts[:, None] + np.arange(count)
        feeds = dict(zip(INPUTS, (ids, positions, starts + count, starts, wanted), strict=True))
        for name, shape, address in self._inputs.upload(feeds):
            context.bind(name, address, shape)
        for past, present, source, target in self._cache.bindings(first):
            context.bind(past, source, (batch, *self._cache.row))
            context.bind(present, target)
        context.bind("logits", self._logits)
        context.run()
        self._cache.keep(first, batch)
        return self._fetch(keep)

    def _fetch(self, count: int) -> Logits:
        """The first `count` rows of the logits as a new array, through the pinned buffer; waits for the step in any case."""
        out = np.empty((count, self.vocab_size), np.float32)
        at_once, width = self.num_slots, self.vocab_size * 4
        for begin in range(0, max(count, 1), at_once):
            size = min(at_once, count - begin) * width
            if size:
                self._cuda.download(self._fetched[:size], self._logits + begin * width)
            self._cuda.synchronize()
            out[begin : begin + at_once] = self._fetched[:size].view(np.float32).reshape(-1, self.vocab_size)
        return out


class _Inputs:
    """The five int32 inputs in one pinned buffer and one device buffer of the same layout: one copy a step."""

    def __init__(self, cuda: Cuda, most: int) -> None:
        self._cuda, self._stride = cuda, -(-most * 4 // 256) * 256  # every tensor at an aligned address
        self._host = cuda.pinned(self._stride * len(INPUTS))
        self._device = cuda.allocate(self._stride * len(INPUTS))

    def upload(self, feeds: dict[str, NDArray[np.int64]]) -> list[tuple[str, tuple[int, ...], int]]:
        """Queue the copy; (name, shape, device address) of each."""
        placed = []
        for index, (name, array) in enumerate(feeds.items()):
            at = index * self._stride
            self._host[at : at + array.size * 4].view(np.int32)[:] = array.ravel()
            placed.append((name, array.shape, self._device + at))
        self._cuda.upload(self._device, self._host)
        return placed


class _Cache:
    """Keys and values: a device buffer [slots, K, max_length, D] for each layer and kind.

    In place, the plan writes into the buffer it reads. With separate past and present it writes into a second one, and
    `keep` copies the block of rows back. Swapping the two instead would save that copy, but then rows outside the step's
    block would lie in the other buffer and every row would need to know which is its own.
    """

    def __init__(self, cuda: Cuda, manifest: Manifest, slots: int) -> None:
        model = manifest.model
        self._cuda = cuda
        self.row = (model.num_kv_heads, model.max_length, model.head_dim)
        self._stride = row_bytes(manifest)
        self._names = [
            (f"past_key_values.{i}.{k}", f"present.{i}.{k}") for i in range(model.num_layers) for k in ("key", "value")
        ]
        self._past = [cuda.allocate(slots * self._stride) for _ in self._names]
        # Attention may multiply what lies past a row's end by a weight of zero: it has to be a number.
        for address in self._past:
            cuda.zero(address, slots * self._stride)
        in_place = manifest.target.cache == "in-place"
        self._present = self._past if in_place else [cuda.allocate(slots * self._stride) for _ in self._names]

    def bindings(self, first: int) -> list[tuple[str, str, int, int]]:
        """(past's name, present's name, past's address, present's address) for steps whose first row is `first`."""
        offset = first * self._stride
        return [
            (*names, past + offset, present + offset)
            for names, past, present in zip(self._names, self._past, self._present, strict=True)
        ]

    def keep(self, first: int, count: int) -> None:
        """Make the rows [first, first + count) of present the past of the next step."""
        if self._present is self._past:
            return
        for _, _, past, present in self.bindings(first):
            self._cuda.copy(past, present, count * self._stride)

    def move(self, source: int, target: int, length: int) -> bool:
        """Copy a row's first `length` positions to another row."""
        heads, positions, _ = self.row
        pitch = self._stride // heads
        for past in self._past:
            if length:
                self._cuda.copy_rows(
                    past + target * self._stride,
                    past + source * self._stride,
                    pitch=pitch,
                    width=pitch // positions * length,
                    height=heads,
                )
        return True


class Plan:
    """A deserialised plan with an execution context for each profile."""

    def __init__(self, library: Any, path: Path, manifest: Manifest, stream: int) -> None:
        self._log = _log(library)  # must outlive the engine
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._runtime = library.Runtime(self._log)
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineFileError(
                f"{library.__name__} cannot load {path}",
                found=self._log.reason(),
                remedy="Build the engine again on this machine.",
            )
        _check(library, engine, manifest)
        self._engine = engine
        self.contexts = [Context(engine, profile, stream, self._log) for profile in (PREFILL, DECODE)]


class Context:
    """An execution context that stays in one profile, and remembers what is bound so that a step sets only what changed."""

    def __init__(self, engine: Any, profile: int, stream: int, log: Any) -> None:
        self._stream, self._log = stream, log
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RunnerError("TensorRT made no execution context", found=log.reason(), remedy="Free device memory.")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._check(self._context.set_optimization_profile_async(profile, stream), f"profile {profile}")

    def bind(self, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        """Where a tensor lies and, for an input, its shape. Raises RunnerError when TensorRT refuses either."""
        if shape is not None and self._shapes.get(name) != shape:
            self._check(self._context.set_input_shape(name, shape), f"shape {shape} for {name}")
            self._shapes[name] = shape
        if self._addresses.get(name) != address:
            self._check(self._context.set_tensor_address(name, address), f"the address of {name}")
            self._addresses[name] = address

    def run(self) -> None:
        """Queue the network. Raises RunnerError when TensorRT refuses to."""
        self._check(self._context.execute_async_v3(self._stream), "the step")

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise RunnerError(f"TensorRT refused {what}", found=self._log.reason())


def _library(runtime: str) -> Any:
    try:
        return importlib.import_module(runtime)
    except ImportError as error:
        raise MissingRuntimeError(
            f"the library {runtime}",
            expected="installed",
            found="not installed",
            remedy=f"Run: pip install {PACKAGES[runtime]}",
        ) from error


def _log(library: Any) -> Any:
    class Log(library.ILogger):  # type: ignore[misc, name-defined]
        """Keeps errors, because TensorRT's calls return no reason."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=4)

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.INTERNAL_ERROR, library.ILogger.Severity.ERROR):
                self._errors.append(str(message))

        def reason(self) -> str:
            """What was logged since the last call of this method."""
            text = "; ".join(self._errors) or "no message"
            self._errors.clear()
            return text

    return Log()


def _check(library: Any, engine: Any, manifest: Manifest) -> None:
    """Raises EngineFileError unless the plan has the tensors, types, sizes and profiles that the manifest promises."""
    model, kind = manifest.model, library.DataType
    cache = {"float32": kind.FLOAT, "float16": kind.HALF, "bfloat16": kind.BF16}[model.cache_dtype]
    pairs = [(f"past_key_values.{i}.{k}", f"present.{i}.{k}") for i in range(model.num_layers) for k in ("key", "value")]
    types = dict.fromkeys(INPUTS, kind.INT32) | {"logits": kind.FLOAT} | {name: cache for pair in pairs for name in pair}

    def refuse(what: str, expected: object, found: object) -> None:
        if expected != found:
            raise EngineFileError(
                f"{manifest.graph} is not what its manifest says: {what}",
                expected=str(expected),
                found=str(found),
                remedy="Build the engine again.",
            )

    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    refuse("inputs and outputs", sorted(types), sorted(names))
    for name, dtype in types.items():
        refuse(f"type of {name}", dtype, engine.get_tensor_dtype(name))
    refuse("profiles", 2, engine.num_optimization_profiles)
    longest = tuple(engine.get_tensor_profile_shape("input_ids", PREFILL)[2])
    refuse("input_ids of profile 0", (1, flag(manifest, "prefill_tokens")), longest)
    widest = tuple(engine.get_tensor_profile_shape("input_ids", DECODE)[2])
    refuse("input_ids of profile 1", (flag(manifest, "decode_batch"), 1), widest)
    refuse("width of logits", model.vocab_size, tuple(engine.get_tensor_shape("logits"))[-1])
    in_place = manifest.target.cache == "in-place"
    for past, present in pairs:
        row = (model.num_kv_heads, model.max_length, model.head_dim)
        refuse(f"shape of {past}", row, tuple(engine.get_tensor_shape(past))[1:])
        if hasattr(engine, "get_aliased_input_tensor"):  # absent from TensorRT before it had a cache-update layer
            refuse(f"input that {present} overwrites", past if in_place else None, engine.get_aliased_input_tensor(present))
