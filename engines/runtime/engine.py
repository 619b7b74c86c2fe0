"""An engine folder, loaded: logits, generated tokens, generated text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compatibility import slots_for
from .errors import ClosedError, EngineFileError, RequestError, RunnerError, ServingError
from .events import TokenEvent
from .guidance import GuideCompiler
from .manifest import Manifest, contained_path, read_manifest
from .manifest import verify_files as check_files
from .request import RequestHandle
from .runner import Runner, Tokens
from .sampling import SamplingParams
from .scheduler import Scheduler
from .text import TOKENIZER_NAME, TextStream, Tokenizer
from .verdict import standing

_USUAL_SLOTS = 8
PREFILL_CHUNK, MAX_QUEUE = 256, 1024
"""Where nothing else is asked for: tokens of a prompt that are read in one step, and requests that may wait for a slot."""
OpenRunner = Callable[[Path, Manifest, int, int | None], Runner]
"""(engine folder, its manifest, slots, threads or None) -> the runner, its model loaded."""


def _onnx(folder: Path, manifest: Manifest, num_slots: int, threads: int | None) -> Runner:
    from .onnx_runner import OnnxRunner

    return OnnxRunner(folder, manifest, num_slots, threads)


def _tensorrt(folder: Path, manifest: Manifest, num_slots: int, threads: int | None) -> Runner:
    from .tensorrt_runner import TensorRTRunner

    return TensorRTRunner(folder, manifest, num_slots, threads)


_RUNNERS: dict[str, OpenRunner] = {"onnxruntime": _onnx, "tensorrt": _tensorrt, "tensorrt_rtx": _tensorrt}


def register_runner(runtime: str, opener: OpenRunner) -> None:
    """Run engines whose `manifest.target.runtime` is `runtime` through `opener`, which is a runtime from outside's own."""
    _RUNNERS[runtime] = opener


class Engine:
    """A model that answers. Use it as a context manager, or call close()."""

    def __init__(
        self,
        runner: Runner,
        manifest: Manifest,
        tokenizer: Tokenizer | None = None,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        max_queue: int = MAX_QUEUE,
    ) -> None:
        self.runner = runner
        self.manifest = manifest
        guides = GuideCompiler(tokenizer.raw if tokenizer is not None else None, runner.vocab_size)
        self.scheduler = Scheduler(runner, prefill_chunk=prefill_chunk, max_queue=max_queue, guides=guides)
        self._tokenizer = tokenizer
        self._closed = False
        # Ends the scheduler's thread when an engine is dropped without close(), at the latest with the interpreter.
        self._finalizer = weakref.finalize(self, _shut_down, self.scheduler, runner)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the scheduler and free the model; requests that are not done are cancelled. Calling it twice is harmless."""
        self._closed = True
        self._finalizer()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises EngineFileError if the folder has no tokenizer.json."""
        if self._tokenizer is None:
            raise EngineFileError(
                "the engine's tokenizer",
                expected=TOKENIZER_NAME,
                found="no such file",
                remedy="Use token ids, or build from a checkpoint that has a tokenizer.",
            )
        return self._tokenizer

    def logits(self, input_ids: NDArray[np.int64], attention_mask: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """The model's logits at every position.

        Args:
            input_ids: token ids, int64 [B, T].
            attention_mask: [B, T], 1 for tokens and 0 for padding, on the left or on the right of a row. A token's position
                is the number of tokens before it in its row.

        Returns:
            float32 [B, T, V]; 0.0 at padded places.

        Raises:
            RequestError: a shape, an id or a length that the model cannot take.
        """
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or 0 in ids.shape:
            raise RequestError(
                "input_ids",
                expected="integers of shape [B, T], B and T at least 1",
                found=f"{ids.dtype} of shape {ids.shape}",
                remedy="Give one row per sequence.",
            )
        mask = np.ones(ids.shape, bool) if attention_mask is None else _mask(attention_mask, ids.shape)
        kept = [row for row in range(len(ids)) if mask[row].any()]
        for row in kept:
            self.scheduler.check_prompt(ids[row, mask[row]])
        out = np.zeros((*ids.shape, self.runner.vocab_size), np.float32)
        self._start()
        # A few at a time, so that no more rows of logits exist than there are slots.
        for first in range(0, len(kept), self.runner.num_slots):
            handles: list[RequestHandle] = []
            rows = kept[first : first + self.runner.num_slots]
            try:
                for row in rows:
                    handles.append(self.scheduler.score(ids[row, mask[row]]))
                for row, handle in zip(rows, handles, strict=True):
                    out[row, mask[row]] = handle.result().context_logits
            finally:
                _abandon(handles)
        return out

    def submit(
        self, prompt: Sequence[int] | Tokens, max_new_tokens: int = 32, ignore_eos: bool = False, **sampling: Any
    ) -> RequestHandle:
        """Queue a request; `sampling` holds options of SamplingParams. Raises RequestError, CapacityError."""
        return self._submit(prompt, self.params(max_new_tokens, ignore_eos, **sampling))

    def params(self, max_new_tokens: int = 32, ignore_eos: bool = False, **sampling: Any) -> SamplingParams:
        """SamplingParams with this model's end tokens, unless eos_token_ids is given. Raises RequestError."""
        sampling.setdefault("eos_token_ids", self.manifest.model.eos_token_ids)
        return SamplingParams.from_options(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, **sampling)

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Tokens],
        max_new_tokens: int = 32,
        ignore_eos: bool = False,
        **sampling: Any,
    ) -> list[list[int]]:
        """Continue each prompt. All are checked before the first is begun.

        Args:
            prompts: lists of token ids.
            max_new_tokens: the most tokens that are made for each.
            ignore_eos: whether to go on after an end token.
            sampling: other options of `SamplingParams`. Each prompt has a random generator of its own, so with a ``seed`` equal
                prompts get equal tokens.

        Returns:
            The new tokens of each prompt alone, an end token included.

        Raises:
            RequestError: a prompt or an option is out of range, or a guide cannot be followed.
            MissingRuntimeError: a guide needs llguidance, which is not installed.
            CapacityError: too many requests wait already.
            RunnerError: the runtime failed.
        """
        params = self.params(max_new_tokens, ignore_eos, **sampling)
        checked = [self.scheduler.check(prompt, params) for prompt in prompts]
        self._start()
        results: list[list[int]] = []
        for first in range(0, len(checked), self.scheduler.max_queue):
            handles: list[RequestHandle] = []
            try:
                for prompt in checked[first : first + self.scheduler.max_queue]:
                    handles.append(self._submit(prompt, params))
                results.extend([handle.result().tokens for handle in handles])
            finally:
                _abandon(handles)
        return results

    def stream(
        self, prompt: Sequence[int] | Tokens, max_new_tokens: int = 32, ignore_eos: bool = False, **sampling: Any
    ) -> Iterator[TokenEvent]:
        """The tokens of one prompt as they come. The request is submitted now, and cancelled if the iterator is closed early.

        Args:
            prompt: token ids.
            max_new_tokens, ignore_eos, sampling: as in `generate`.

        Yields:
            `TokenEvent`, one for each new token.

        Raises:
            ServingError: as `generate`; a bad request at once, a failing runner while iterating.
        """
        return _events(self.submit(prompt, max_new_tokens, ignore_eos, **sampling))

    def stream_text(
        self,
        prompt: str | bytes,
        max_new_tokens: int = 32,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        add_special_tokens: bool = True,
        **sampling: Any,
    ) -> Iterator[str]:
        """The continuation of a text, in pieces as they come.

        Args:
            prompt: text; bytes are read as UTF-8.
            max_new_tokens, ignore_eos, sampling: as in `generate`.
            stop: strings; the text ends before the first of them.
            add_special_tokens: whether the tokenizer adds its own, such as a bos, to the prompt; a rendered chat template has
                them already.

        Yields:
            Pieces of text, none of them empty.

        Raises:
            ServingError: as `generate`, and EngineFileError where the engine has no tokenizer.
        """
        tokens = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        params = self.params(max_new_tokens, ignore_eos, **sampling)
        stream = TextStream(self.tokenizer, stop, min_tokens=params.min_new_tokens, context=tokens)
        return _pieces(self._submit(tokens, params), stream)

    def generate_text(
        self,
        prompt: str | bytes,
        max_new_tokens: int = 32,
        *,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        add_special_tokens: bool = True,
        **sampling: Any,
    ) -> str:
        """The continuation of a text, without the prompt and without special tokens. Arguments and errors as in `stream_text`."""
        pieces = self.stream_text(
            prompt, max_new_tokens, stop=stop, ignore_eos=ignore_eos, add_special_tokens=add_special_tokens, **sampling
        )
        return "".join(pieces)

    def _submit(self, prompt: Sequence[int] | Tokens, params: SamplingParams) -> RequestHandle:
        self._start()
        handle = self.scheduler.submit(prompt, params)
        handle.owner = self
        return handle

    def _start(self) -> None:
        if self._closed:
            raise ClosedError("the engine is closed", remedy="Load it again.")
        self.scheduler.start()


def load_engine(
    path: str | Path,
    *,
    num_slots: int | None = None,
    threads: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    max_queue: int = MAX_QUEUE,
    verify_files: bool = True,
    tokenizer: Tokenizer | None = None,
) -> Engine:
    """Load an engine's folder. Its manifest and its files are checked first.

    Args:
        path: the folder.
        num_slots: sequences that are worked on at a time; 8 unless given, or fewer if it was built for fewer.
        threads: CPU threads of the runtime; its own choice unless given.
        prefill_chunk: the most tokens of a prompt that are read in one step. Other requests wait for a step: a smaller
            number answers them sooner, a larger one reads long prompts faster.
        max_queue: requests that may wait for a slot; further ones are refused with CapacityError.
        verify_files: compare every file's SHA-256 with the manifest's; without it the size alone.
        tokenizer: in place of the folder's own.

    Returns:
        The engine, a context manager.

    Raises:
        EngineFileError: the folder, its manifest, a file of it or its verdict is not what it should be.
        MissingRuntimeError: the runtime's library is not installed.
        RunnerError: the runtime refuses the engine, or this machine cannot run it.
        RequestError: a number is out of range.
    """
    numbers = {"num_slots": num_slots, "threads": threads, "prefill_chunk": prefill_chunk, "max_queue": max_queue}
    for name, value in numbers.items():
        if name in ("num_slots", "threads") and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestError(name, expected="an integer of at least 1", found=repr(value))
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, digests=verify_files)
    if tokenizer is None and (folder / TOKENIZER_NAME).exists():
        tokenizer = Tokenizer.load(contained_path(folder, TOKENIZER_NAME))
    standing(folder, manifest)  # an engine that failed or has no verdict is loaded, one whose verdict is another's is not
    slots = slots_for(manifest, _USUAL_SLOTS) if num_slots is None else num_slots
    runner = open_runner(folder, manifest, slots, threads)
    return Engine(runner, manifest, tokenizer, prefill_chunk=prefill_chunk, max_queue=max_queue)


def open_runner(folder: Path, manifest: Manifest, num_slots: int, threads: int | None = None) -> Runner:
    """The runner of the manifest's runtime, with the model loaded; `load_engine` does this and checks the files first.

    Raises EngineFileError, MissingRuntimeError, RunnerError.
    """
    runtime = manifest.target.runtime
    if runtime not in _RUNNERS:
        raise EngineFileError(
            "manifest field 'target.runtime'",
            expected=" or ".join(_RUNNERS),
            found=runtime,
            remedy="TensorRT-LLM runs its engines itself: serve them with trtllm-serve or its Triton backend."
            if runtime == "tensorrt_llm"
            else "This engine needs another version of the package.",
        )
    remedy = "See whether the engine was built for this machine and this version of its runtime; if it was, build it again."
    try:
        return _RUNNERS[runtime](folder, manifest, num_slots, threads)
    except (ServingError, ModuleNotFoundError):
        raise
    except MemoryError as error:
        raise RunnerError(
            f"the engine {manifest.name[:200]} does not fit this machine's memory",
            found=str(error)[:200],
            remedy=f"Ask for fewer slots than {num_slots}, or use a machine with more memory.",
        ) from error
    except Exception as error:  # a manifest and a graph that contradict each other end in the runtime's own errors
        raise EngineFileError(
            f"the engine {manifest.name[:200]} cannot be loaded", found=f"{type(error).__name__}: {error}"[:500], remedy=remedy
        ) from error


def _shut_down(scheduler: Scheduler, runner: Runner) -> None:
    scheduler.stop()
    runner.release()


def _mask(attention_mask: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    mask = np.asarray(attention_mask)
    if mask.shape != shape or not np.isin(mask, (0, 1)).all():
        raise RequestError(
            "attention_mask", expected=f"zeros and ones of shape {shape}", found=f"{mask.dtype} of shape {mask.shape}"
        )
    return mask.astype(bool)


def _events(handle: RequestHandle) -> Iterator[TokenEvent]:
    try:
        yield from handle
    finally:
        handle.cancel()


def _pieces(handle: RequestHandle, stream: TextStream) -> Iterator[str]:
    try:
        for event in handle:
            piece = stream.push(event.token) if event.has_token else ""
            if stream.stopped:
                handle.cancel("stop")
            if piece:
                yield piece
            if stream.stopped:
                return
        if rest := stream.flush():
            yield rest
    finally:
        handle.cancel()


def _abandon(handles: Sequence[RequestHandle]) -> None:
    for handle in handles:
        if not handle.done:
            handle.cancel()
