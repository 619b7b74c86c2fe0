"""Continuous batching: requests join and leave a running batch, one engine iteration at a time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import CapacityError, ClosedError, RequestError, RunnerError, ServingError
from .request import RequestHandle, TokenEvent
from .runner import Logits, Runner, Tokens
from .sampler import Sampler
from .sampling import SamplingParams

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stats:
    """Gauges of this moment, then counters since the scheduler was made (names ending in ``_total``)."""

    queued: int
    active: int
    slots: int
    free_slots: int
    requests_total: int
    rejected_total: int
    completed_total: int
    cancelled_total: int
    failed_total: int
    prompt_tokens_total: int
    generated_tokens_total: int
    steps_total: int


@dataclass(eq=False)
class _Active:
    """A request that holds a slot."""

    handle: RequestHandle
    slot: int
    sampler: Sampler
    read: int = 0
    next_token: int | None = None
    """The token chosen last, which the next decode feeds; None while the prompt is being read."""


@dataclass
class _Counters:
    requests: int = 0
    rejected: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    by_reason: dict[str, str] = field(default_factory=lambda: {"cancelled": "cancelled", "error": "failed"})

    def finish(self, reason: str) -> None:
        name = self.by_reason.get(reason, "completed")
        setattr(self, name, getattr(self, name) + 1)


class Scheduler:
    """Drives a `Runner` for any number of requests at once. All methods may be called from any thread.

    A step frees the slots of cancelled requests, admits waiting ones in order of arrival, reads about one chunk of
    `prefill_chunk` prompt tokens, and decodes one token for every request whose prompt is read. A prompt is cut at
    multiples of its own `prefill_chunk`, so its neighbours do not change how it is read.

    Either `start` a thread that steps while there is work, or let handles step: without a thread, waiting for a
    handle takes the steps it needs.
    """

    def __init__(self, runner: Runner, *, prefill_chunk: int = 256, max_queue: int = 1024) -> None:
        for name, value in (("prefill_chunk", prefill_chunk), ("max_queue", max_queue)):
            if value < 1:
                raise RequestError(f"{name} is out of range", expected="at least 1", found=str(value))
        self.runner = runner
        self.prefill_chunk, self.max_queue = prefill_chunk, max_queue
        self._queue: deque[RequestHandle] = deque()
        self._active: list[_Active] = []
        self._count = _Counters()
        # _state guards the queue, the flags and the counters, briefly; _stepping is held for a whole step.
        self._state = threading.Condition()
        self._stepping = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stopping = self._closed = self._woken = False

    # Requests.

    def submit(
        self,
        prompt: Sequence[int] | Tokens,
        params: SamplingParams | None = None,
        *,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> RequestHandle:
        """Queue a request. `on_event` is called with every event in the scheduler's thread, and must be quick.

        Raises RequestError for a prompt or options this model cannot serve, CapacityError when `max_queue`
        requests wait already, ClosedError after `stop`.
        """
        params = params or SamplingParams()
        return self._enqueue(RequestHandle(self, self.check(prompt, params), params, on_event))

    def score(self, prompt: Sequence[int] | Tokens) -> RequestHandle:
        """Queue a prompt to be read only: `context_logits` float32 [T, V], no new tokens. Raises as `submit`."""
        params = SamplingParams(max_new_tokens=1, return_context_logits=True)
        return self._enqueue(RequestHandle(self, self.check_prompt(prompt), params, read_only=True))

    def check(self, prompt: Sequence[int] | Tokens, params: SamplingParams) -> Tokens:
        """The prompt as int64 [T]. Raises RequestError when `submit` would refuse it for what it is."""
        try:
            params.check_vocabulary(self.runner.vocab_size)
            return self.check_prompt(prompt, params.max_new_tokens)
        except RequestError:
            with self._state:
                self._count.rejected += 1
            raise

    def check_prompt(self, prompt: Sequence[int] | Tokens, new_tokens: int = 0) -> Tokens:
        """The prompt as int64 [T]. Raises RequestError unless it and `new_tokens` more fit this model."""
        tokens = as_tokens(prompt, self.runner.vocab_size)
        limit = self.runner.max_length
        if len(tokens) + min(new_tokens, 1) > limit:
            raise RequestError(
                "the prompt is too long", expected=f"at most {limit - min(new_tokens, 1)} tokens",
                found=f"{len(tokens)}", remedy="shorten it",
            )  # fmt: skip
        if len(tokens) + new_tokens > limit:
            raise RequestError(
                "prompt and new tokens together do not fit the engine", expected=f"at most {limit} tokens",
                found=f"{len(tokens)} + {new_tokens}",
                remedy=f"shorten the prompt, or ask for at most {limit - len(tokens)} new tokens",
            )  # fmt: skip
        return tokens

    def _enqueue(self, handle: RequestHandle) -> RequestHandle:
        with self._state:
            if self._closed:
                raise ClosedError("the scheduler was stopped", remedy="load the engine again")
            if len(self._queue) >= self.max_queue:
                self._count.rejected += 1
                raise CapacityError(
                    "the queue is full", expected=f"fewer than {self.max_queue} waiting requests",
                    found=str(len(self._queue)), remedy="try again later",
                )  # fmt: skip
            self._count.requests += 1
            self._queue.append(handle)
            self._state.notify_all()
        return handle

    # The thread.

    @property
    def running(self) -> bool:
        """Whether a thread steps."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    def start(self) -> None:
        """Step in a thread while there is work. Raises ClosedError after `stop`; a second call does nothing."""
        with self._state:
            if self._closed:
                raise ClosedError("the scheduler was stopped", remedy="make a new one")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
                self._thread.start()

    def stop(self, *, drain: bool = False) -> None:
        """Refuse new requests, end those in flight by "cancelled" (`drain`: let them finish), end the thread."""
        with self._state:
            self._closed = True
        if drain:
            while self._has_work():
                self.step()
        with self._state:
            self._stopping = True
            self._state.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._end_all("cancelled", None)

    def wake(self) -> None:
        """Make a waiting thread look at its requests again."""
        with self._state:
            self._woken = True
            self._state.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._state:
                    self._state.wait_for(lambda: self._stopping or self._woken or self._has_work())
                    if self._stopping:
                        return
                    self._woken = False
                self.step()
        except BaseException as error:
            # A defect of ours, or the interpreter going down: nobody would ever step again, so nobody may wait.
            _log.exception("the scheduler's thread failed")
            with self._state:
                self._closed = True
            self._end_all("error", error)

    def _has_work(self) -> bool:
        return bool(self._queue or self._active)

    def _end_all(self, reason: Any, cause: BaseException | None) -> None:
        with self._stepping:
            with self._state:
                waiting = list(self._queue)
                self._queue.clear()
            error = None if cause is None else _as_serving_error("the scheduler failed", cause)
            for active in list(self._active):
                self._leave(active)
                self._end(active.handle, reason, error)
            for handle in waiting:
                self._end(handle, reason, error)

    # One iteration.

    def step(self) -> bool:
        """One engine iteration; returns whether there was anything to do. A runner's failure ends the requests
        it concerns, never the scheduler."""
        with self._stepping:
            if not self._has_work():
                return False
            with self._state:
                self._count.steps += 1
            self._drop_cancelled()
            self._admit()
            self._prefill()
            self._decode()
            return True

    def _drop_cancelled(self) -> None:
        for active in [a for a in self._active if a.handle.cancel_requested]:
            self._leave(active)
            self._end(active.handle, "cancelled")
        with self._state:
            gone = [handle for handle in self._queue if handle.cancel_requested]
            if gone:
                self._queue = deque(handle for handle in self._queue if handle not in gone)
        for handle in gone:
            self._end(handle, "cancelled")

    def _admit(self) -> None:
        while len(self._active) < self.runner.num_slots:
            with self._state:
                if not self._queue:
                    return
                handle = self._queue.popleft()
            try:
                slot = self.runner.open()
            except CapacityError as error:
                # Someone else holds the runner's slots. Wait for ours to free one; if we have none, say so.
                if not self._active:
                    self._end(handle, "error", error)
                    continue
                with self._state:
                    self._queue.appendleft(handle)
                return
            except Exception as error:
                self._end(handle, "error", _as_serving_error("the runner could not open a slot", error))
                continue
            sampler = Sampler(handle.params, handle.prompt.tolist(), self.runner.vocab_size)
            self._active.append(_Active(handle, slot, sampler))
            handle.mark_scheduled()

    def _prefill(self) -> None:
        budget = self.prefill_chunk
        for active in [a for a in self._active if a.next_token is None]:
            if budget <= 0:
                return
            handle = active.handle
            chunk = handle.prompt[active.read : active.read + self.prefill_chunk]
            keep = handle.params.return_context_logits
            try:
                logits = self.runner.prefill(active.slot, chunk, all_logits=keep)
                wanted = (len(chunk), self.runner.vocab_size) if keep else (self.runner.vocab_size,)
                _check_shape(logits, wanted)
            except Exception as error:
                self._fail([active], "the runner failed while reading a prompt", error)
                continue
            budget -= len(chunk)
            active.read += len(chunk)
            with self._state:
                self._count.prompt_tokens += len(chunk)
            if keep:
                handle.add_context(np.array(logits, dtype=np.float32))
                logits = logits[-1]
            if active.read == len(handle.prompt):
                if handle.read_only:
                    self._leave(active)
                    self._end(handle, "length")
                else:
                    self._advance(active, logits)

    def _decode(self) -> None:
        ready = [active for active in self._active if active.next_token is not None]
        if not ready:
            return
        tokens = np.array([active.next_token for active in ready], dtype=np.int64)
        try:
            logits = self.runner.decode([active.slot for active in ready], tokens)
            _check_shape(logits, (len(ready), self.runner.vocab_size))
        except Exception as error:
            self._fail(ready, "the runner failed while decoding", error)
            return
        for active, row in zip(ready, logits, strict=True):
            self._advance(active, row)

    def _advance(self, active: _Active, logits: Logits) -> None:
        """Choose a request's next token from float32 [V], and deliver it."""
        handle, sampler = active.handle, active.sampler
        try:
            token, logprob = sampler.sample(logits)
        except Exception as error:
            self._fail([active], "choosing a token failed", error)
            return
        with self._state:
            self._count.generated_tokens += 1
        reason = sampler.finish_reason()
        event = TokenEvent(
            token=token,
            index=len(sampler.output) - 1,
            logprob=logprob,
            finish_reason=reason,
            stop_sequence=sampler.stop_match() if reason == "stop" else (),
            logits=np.array(logits, dtype=np.float32) if handle.params.return_generation_logits else None,
        )
        active.next_token = token
        if reason is not None:
            self._leave(active)
            with self._state:
                self._count.finish(reason)
        self._deliver(active, event)

    def _deliver(self, active: _Active, event: TokenEvent) -> None:
        try:
            active.handle.emit(event)
        except Exception as error:
            _log.exception("a request's on_event callback failed")
            if event.finish_reason is None:
                self._fail([active], "the request's on_event callback failed", error)

    # Endings.

    def _fail(self, concerned: Sequence[_Active], what: str, cause: Exception) -> None:
        error = _as_serving_error(what, cause)
        for active in concerned:
            self._leave(active)
            self._end(active.handle, "error", error)

    def _leave(self, active: _Active) -> None:
        """Give the request's slot back."""
        self._active.remove(active)
        try:
            self.runner.close(active.slot)
        except Exception:
            _log.exception("the runner could not close slot %s", active.slot)

    def _end(self, handle: RequestHandle, reason: Any, error: ServingError | None = None) -> None:
        with self._state:
            self._count.finish(reason)
        try:
            handle.end(reason, error)
        except Exception:
            _log.exception("a request's on_event callback failed")

    def stats(self) -> Stats:
        """Gauges and counters, for metrics; `dataclasses.asdict` makes a dictionary of them."""
        with self._state:
            c, active = self._count, len(self._active)
            return Stats(
                queued=len(self._queue),
                active=active,
                slots=self.runner.num_slots,
                free_slots=self.runner.num_slots - active,
                requests_total=c.requests,
                rejected_total=c.rejected,
                completed_total=c.completed,
                cancelled_total=c.cancelled,
                failed_total=c.failed,
                prompt_tokens_total=c.prompt_tokens,
                generated_tokens_total=c.generated_tokens,
                steps_total=c.steps,
            )


def as_tokens(prompt: Sequence[int] | Tokens, vocab_size: int) -> Tokens:
    """A prompt as int64 [T]. Raises RequestError unless it is a flat, non-empty list of token ids below vocab_size."""
    try:
        tokens = np.asarray(prompt)
    except ValueError:
        tokens = np.empty(0, dtype=object)
    if tokens.ndim != 1:
        raise RequestError(
            "the prompt is not a list of token ids", expected="one dimension", found=f"{tokens.ndim} dimensions",
            remedy="pass one list of integers per request",
        )  # fmt: skip
    if len(prompt) == 0:
        raise RequestError("the prompt is empty", expected="at least one token", remedy="begin with the bos token")
    if tokens.dtype.kind not in "iu":
        raise RequestError("the prompt is not a list of token ids", expected="integers", found=str(tokens.dtype))
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise RequestError(
            "a token id is out of range", expected=f"0 to {vocab_size - 1}", found=str(low if low < 0 else high),
            remedy="tokenise with the engine's own tokenizer",
        )  # fmt: skip
    return tokens.astype(np.int64)


def _check_shape(logits: Logits, wanted: tuple[int, ...]) -> None:
    if np.shape(logits) != wanted:
        raise RunnerError("the runner's logits have the wrong shape", expected=str(wanted), found=str(np.shape(logits)))


def _as_serving_error(what: str, cause: BaseException) -> ServingError:
    if isinstance(cause, ServingError):
        return cause
    error = RunnerError(what, found=f"{type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
