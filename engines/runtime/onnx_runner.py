"""Runs an engine's ONNX graph for the scheduler: many sequences, each in a slot of one key-value cache.

With the cache in place (the fused graph) every layer has one buffer [slots, K, max_length, D]; past and present are bound to
the same memory, and a step touches only the rows it needs. With a growing cache (the portable graph) each slot keeps
its own arrays. The CUDA path is contract-tested; not executed on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import EngineFileError, MissingRuntimeError
from .slots import Slots

if TYPE_CHECKING:
    from .manifest import Manifest

Logits = NDArray[np.float32]
_DTYPES = {"float32": np.float32, "float16": np.float16}
_HEAD_MULTIPLE = 8  # the fused attention's kernels want heads of so many channels, and a graph for them pads


class OnnxRunner:
    """The `Runner` protocol over onnxruntime.InferenceSession. Not thread-safe: the scheduler is its one caller."""

    def __init__(self, folder: Path, manifest: Manifest, num_slots: int, threads: int | None = None) -> None:
        model = manifest.model
        self.vocab_size, self.max_length, self.num_slots = model.vocab_size, model.max_length, num_slots
        self.layers = model.num_layers
        self.in_place = manifest.target.cache == "in-place"
        if model.cache_dtype not in _DTYPES or manifest.target.cache not in ("in-place", "growing"):
            raise _contradiction(
                manifest, "a cache in-place or growing, of float32 or float16", f"{manifest.target.cache}, {model.cache_dtype}"
            )
        self._session = _open_session(folder / manifest.graph, manifest.target.providers, threads)
        self._device = "cuda" if self._session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
        row = (model.num_kv_heads, self.max_length, _cache_channels(self._session, manifest))
        dtype = np.dtype(_DTYPES[model.cache_dtype])
        self._cache: _SharedCache | _GrowingCache
        if self.in_place:
            self._cache = _SharedCache(self._session, self.layers, model.vocab_size, num_slots, row, dtype, self._device)
        else:
            self._cache = _GrowingCache(self._session, self.layers, row, dtype)
        self._slots = Slots(num_slots, self.max_length)

    def open(self) -> int:
        """Take a free slot with an empty cache. Raises CapacityError when all are taken."""
        return self._slots.open()

    def close(self, slot: int) -> None:
        """Give the slot back. The last row moves into the hole, so that the rows in use stay one block."""
        self._cache.clear(self._slots.close(slot, self._cache.move))

    def release(self) -> None:
        """Let the session and the cache go."""
        self._session = self._cache = None  # type: ignore[assignment]

    def prefill(self, slot: int, tokens: NDArray[np.int64], *, all_logits: bool = False) -> Logits:
        """Append int64 [T] to the slot: logits [V] of the last token, or [T, V]. Raises CapacityError past max_length."""
        row = self._slots.row(slot)
        self._slots.check_room(row, len(tokens))
        start = int(self._slots.lengths[row])
        total = start + len(tokens)
        logits = self._cache.run(
            row,
            1,
            np.ascontiguousarray(tokens, dtype=np.int64)[None],
            np.ones((1, total), np.int64),
            np.arange(start, total, dtype=np.int64)[None],
        )
        self._slots.lengths[row] = total
        wanted: Logits = logits[0] if all_logits else logits[0, -1]
        return wanted

    def decode(self, slots: Sequence[int], tokens: NDArray[np.int64]) -> Logits:
        """Append one token to each slot: logits [n, V]. Raises CapacityError past max_length."""
        block = self._slots.block(slots)
        if not self.in_place:
            steps = [self.prefill(slot, np.asarray([token], np.int64)) for slot, token in zip(slots, tokens, strict=True)]
            return np.stack(steps)
        ids = np.zeros((block.size, 1), np.int64)
        ids[block.offsets, 0] = tokens
        lengths = block.starts + 1
        mask = (np.arange(int(lengths.max())) < lengths[:, None]).astype(np.int64)
        logits = self._cache.run(block.first, block.size, ids, mask, block.starts[:, None])
        self._slots.lengths[block.first + block.offsets] += 1
        result: Logits = logits[block.offsets, 0]
        return result


def _cache_channels(session: Any, manifest: Manifest) -> int:
    """Channels of a cached head: the graph says so, because a kernel may want more than the network has.

    Raises EngineFileError unless the graph's cache has the layers and heads that the manifest says: a mere subset would be bound.
    """
    model = manifest.model
    found = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    wanted = {f"past_key_values.{layer}.{kind}" for layer in range(model.num_layers) for kind in ("key", "value")}
    if set(found) != wanted:
        raise _contradiction(manifest, f"{model.num_layers} layers", f"{len(found) // 2}")
    channels = {shape[3] if len(shape) == 4 else 0 for shape in found.values()}
    widest = -(-model.head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE
    for name, shape in found.items():
        heads = shape[1] if len(shape) == 4 else 0
        if heads != model.num_kv_heads or len(channels) != 1 or not channels <= {model.head_dim, widest}:
            raise _contradiction(manifest, f"[batch, {model.num_kv_heads}, length, {model.head_dim}]", f"{name} {shape}")
    return int(channels.pop())


def _contradiction(manifest: Manifest, expected: str, found: str) -> EngineFileError:
    return EngineFileError(
        f"the graph of {manifest.name[:200]} is not the one that its manifest describes",
        expected=expected,
        found=found[:300],
        remedy="Build the engine again; do not edit the manifest by hand.",
    )


class _SharedCache:
    """One buffer a layer and kind, bound as past and present at once."""

    def __init__(
        self, session: Any, layers: int, vocab: int, slots: int, row: tuple[int, int, int], dtype: np.dtype[Any], device: str
    ) -> None:
        self._session, self._vocab, self._row, self._dtype, self._device = session, vocab, row, dtype, device
        self._names = [(f"past_key_values.{i}.{k}", f"present.{i}.{k}") for i in range(layers) for k in ("key", "value")]
        shape = (slots, *row)
        if device == "cpu":
            # zeros() leaves untouched pages unallocated, so a long maximum length costs nothing until it is used.
            self._buffers: list[Any] = [np.zeros(shape, dtype) for _ in self._names]
            self._pointers = [buffer.ctypes.data for buffer in self._buffers]
        else:
            import onnxruntime

            make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
            self._buffers = [make(list(shape), dtype, device, 0) for _ in self._names]
            self._pointers = [buffer.data_ptr() for buffer in self._buffers]
        self._stride = int(np.prod(row)) * dtype.itemsize
        self._bindings: dict[tuple[int, int], Any] = {}

    def run(self, first: int, count: int, ids: Any, mask: Any, positions: Any) -> Logits:
        """One step over rows [first, first + count): logits float32 [count, S, V]."""
        binding = self._binding(first, count)
        for name, array in (("input_ids", ids), ("attention_mask", mask), ("position_ids", positions)):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        logits: Logits = np.empty((*ids.shape, self._vocab), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits

    def _binding(self, first: int, count: int) -> Any:
        key = (first, count)
        if key not in self._bindings:
            binding = self._session.io_binding()
            for (past, present), pointer in zip(self._names, self._pointers, strict=True):
                where = (self._device, 0, self._dtype.type, (count, *self._row), pointer + first * self._stride)
                binding.bind_input(past, *where)
                binding.bind_output(present, *where)
            self._bindings[key] = binding
        return self._bindings[key]

    def move(self, source: int, target: int, length: int) -> bool:
        """Copy a row's first `length` positions; False where the memory is not the host's."""
        if self._device != "cpu":
            return False
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]
        return True

    def clear(self, row: int) -> None:
        """Nothing to do: a row's length alone says what in it is valid."""


class _GrowingCache:
    """Arrays per slot that the graph returns one step longer."""

    def __init__(self, session: Any, layers: int, row: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
        self._session = session
        self._past = [f"past_key_values.{i}.{k}" for i in range(layers) for k in ("key", "value")]
        self._outputs = ["logits", *(f"present.{i}.{k}" for i in range(layers) for k in ("key", "value"))]
        self._empty = np.zeros((1, row[0], 0, row[2]), dtype)
        self._state: dict[int, list[Any]] = {}

    def run(self, first: int, count: int, ids: Any, mask: Any, positions: Any) -> Logits:
        """One step of the one sequence in row `first`: logits float32 [1, S, V]."""
        state = self._state.get(first) or [self._empty] * len(self._past)
        feeds = dict(zip(self._past, state, strict=True), input_ids=ids, attention_mask=mask, position_ids=positions)
        logits, *present = self._session.run(self._outputs, feeds)
        self._state[first] = present
        result: Logits = logits
        return result

    def move(self, source: int, target: int, length: int) -> bool:
        """Rename a row."""
        self._state[target] = self._state.pop(source, [])
        return True

    def clear(self, row: int) -> None:
        """Forget a row."""
        self._state.pop(row, None)


def _open_session(graph: Path, providers: Sequence[str], threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingRuntimeError(
            "this engine runs on ONNX Runtime",
            expected="onnxruntime installed",
            found="not installed",
            remedy="Run: pip install onnxruntime",
        ) from error
    available = onnxruntime.get_available_providers()
    if providers[0] not in available:
        raise EngineFileError(
            f"this engine needs ONNX Runtime's {providers[0]}",
            expected=providers[0],
            found=", ".join(available),
            remedy="Run, on a machine with a GPU: pip install onnxruntime-gpu (the extra onnx-gpu). "
            "Or build the engine for a cpu target.",
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=list(providers))
    except Exception as error:
        raise EngineFileError(f"ONNX Runtime cannot load {graph}", found=str(error)) from error
