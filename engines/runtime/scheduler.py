"""Continuous batching: requests join and leave a running batch, one engine iteration at a time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .checks import as_serving_error, as_tokens, check_room, check_shape
from .errors import CapacityError, ClosedError, RequestError, ServingError
from .events import FinishReason, TokenEvent
from .guidance import GuideCompiler, GuideMatcher
from .request import RequestHandle
from .runner import Logits, Runner, Tokens
from .sampler import Sampler, most_probable
from .sampling import SamplingParams
from .stats import Counters, Stats

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Active:
    """A request that holds a slot."""

    handle: RequestHandle
    slot: int
    sampler: Sampler
    read: int = 0
    next_token: int | None = None
    """The token chosen last, which the next decode feeds; None while the prompt is being read."""


class Scheduler:
    """Drives a `Runner` for any number of requests at once. All methods may be called from any thread.

    A step frees the slots of cancelled requests, admits waiting ones in order of arrival, reads about one chunk of
    `prefill_chunk` prompt tokens, and decodes one token for every request whose prompt is read. A prompt is cut at
    multiples of its own `prefill_chunk`, so its neighbours do not change how it is read.

    Either `start` a thread that steps while there is work, or let handles step: without a thread, waiting for a
    handle takes the steps it needs.
    """

    def __init__(
        self, runner: Runner, *, prefill_chunk: int = 256, max_queue: int = 1024, guides: GuideCompiler | None = None
    ) -> None:
        for name, value in (("prefill_chunk", prefill_chunk), ("max_queue", max_queue)):
            if value < 1:
                raise RequestError(f"{name} is out of range", expected="at least 1", found=str(value))
        self.runner = runner
        self.prefill_chunk, self.max_queue = prefill_chunk, max_queue
        self.guides = guides or GuideCompiler(None, runner.vocab_size)
        self._queue: deque[RequestHandle] = deque()
        self._active: list[_Active] = []
        self._count = Counters()
        # _state guards the queue, the flags and the counters, briefly; _stepping is held for a whole step.
        self._state = threading.Condition()
        self._stepping = threading.RLock()
        self._thread: threading.Thread | None = None
        self._stopping = self._closed = self._in_step = False

    # Requests.

    def submit(
        self,
        prompt: Sequence[int] | Tokens,
        params: SamplingParams | None = None,
        *,
        on_event: Callable[[TokenEvent], None] | None = None,
    ) -> RequestHandle:
        """Queue a request. `on_event` is called with every event by whichever thread steps or cancels: it must be
        quick, and must not wait for a request.

        Raises RequestError for a prompt or options this model cannot serve, CapacityError when `max_queue`
        requests wait already, ClosedError after `stop`. A guide is compiled here, in the caller's thread; for one also
        MissingRuntimeError without llguidance.
        """
        params = params or SamplingParams()
        tokens = self.check(prompt, params)
        return self._enqueue(RequestHandle(self, tokens, params, on_event, guide=self._compiled(params)))

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

    def _compiled(self, params: SamplingParams) -> GuideMatcher | None:
        if params.guide is None:
            return None
        try:
            return self.guides.compile(params.guide, params.eos_token_ids)
        except ServingError:
            with self._state:
                self._count.rejected += 1
            raise

    def check_prompt(self, prompt: Sequence[int] | Tokens, new_tokens: int = 0) -> Tokens:
        """The prompt as int64 [T]. Raises RequestError unless it and `new_tokens` more fit this model."""
        tokens = as_tokens(prompt, self.runner.vocab_size)
        check_room(len(tokens), new_tokens, self.runner.max_length)
        return tokens

    def _enqueue(self, handle: RequestHandle) -> RequestHandle:
        with self._state:
            if self._closed:
                raise ClosedError("the scheduler was stopped", remedy="Load the engine again.")
            if len(self._queue) >= self.max_queue:
                self._count.rejected += 1
                raise CapacityError(
                    "the queue is full",
                    expected=f"fewer than {self.max_queue} waiting requests",
                    found=str(len(self._queue)),
                    remedy="Try again later.",
                )
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
                raise ClosedError("the scheduler was stopped", remedy="Make a new one.")
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
        """Drop cancelled requests now, unless a step is under way: the next one drops them first thing."""
        if self._stepping.acquire(blocking=False):
            try:
                if not self._in_step:
                    self._drop_cancelled()
            finally:
                self._stepping.release()

    def _run(self) -> None:
        try:
            while True:
                with self._state:
                    self._state.wait_for(lambda: self._stopping or self._has_work())
                    if self._stopping:
                        return
                self.step()
        except BaseException as error:
            # A defect of ours, or the interpreter going down: nobody would ever step again, so nobody may wait.
            _log.exception("the scheduler's thread failed")
            with self._state:
                self._closed = True
            self._end_all("error", error)

    def _has_work(self) -> bool:
        return bool(self._queue or self._active)

    def _end_all(self, reason: FinishReason, cause: BaseException | None) -> None:
        with self._stepping:
            with self._state:
                waiting = list(self._queue)
                self._queue.clear()
            for active in list(self._active):
                waiting.append(active.handle)
                self._leave(active)
            for handle in waiting:
                error = None if cause is None else as_serving_error("the scheduler failed", cause)
                self._end(handle, reason, error)

    # One iteration.

    def step(self) -> bool:
        """One engine iteration; returns whether there was anything to do. A runner's failure ends the requests
        it concerns, never the scheduler."""
        with self._stepping:
            if not self._has_work():
                return False
            self._in_step = True
            try:
                self._drop_cancelled()
                self._admit()
                self._prefill()
                self._decode()
            finally:
                self._in_step = False
            with self._state:
                self._count.steps += 1
            return True

    def _drop_cancelled(self) -> None:
        for active in list(self._active):
            if (reason := active.handle.cancel_reason) is not None:
                self._leave(active)
                self._end(active.handle, reason)
        with self._state:
            waiting, self._queue = self._queue, deque()
            gone = []
            for handle in waiting:
                if (reason := handle.cancel_reason) is None:
                    self._queue.append(handle)
                else:
                    gone.append((handle, reason))
        for handle, why in gone:
            self._end(handle, why)

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
                self._end(handle, "error", as_serving_error("the runner could not open a slot", error))
                continue
            sampler = Sampler(handle.params, handle.prompt.tolist(), self.runner.vocab_size, handle.guide)
            self._active.append(_Active(handle, slot, sampler))
            handle.mark_scheduled()

    def _prefill(self) -> None:
        budget = self.prefill_chunk
        for active in [a for a in self._active if a.next_token is None]:
            if budget <= 0:
                return
            handle = active.handle
            if handle.done:  # a callback stopped the scheduler in the middle of this step
                continue
            chunk = handle.prompt[active.read : active.read + self.prefill_chunk]
            keep = handle.params.return_context_logits
            try:
                logits = self.runner.prefill(active.slot, chunk, all_logits=keep)
                wanted = (len(chunk), self.runner.vocab_size) if keep else (self.runner.vocab_size,)
                check_shape(logits, wanted)
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
        ready.sort(key=lambda active: active.slot)
        if not ready:
            return
        tokens = np.array([active.next_token for active in ready], dtype=np.int64)
        try:
            logits = self.runner.decode([active.slot for active in ready], tokens)
            check_shape(logits, (len(ready), self.runner.vocab_size))
        except Exception as error:
            self._fail(ready, "the runner failed while decoding", error)
            return
        for active, row in zip(ready, logits, strict=True):
            self._advance(active, row)

    def _advance(self, active: _Active, logits: Logits) -> None:
        """Choose a request's next token from float32 [V], and deliver it."""
        handle, sampler = active.handle, active.sampler
        if handle.done:  # as above
            return
        try:
            token, logprob = sampler.sample(logits)
            top = most_probable(logits, handle.params.top_logprobs) if handle.params.top_logprobs else ()
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
            top_logprobs=top,
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
        for active in concerned:
            self._leave(active)
            self._end(active.handle, "error", as_serving_error(what, cause))

    def _leave(self, active: _Active) -> None:
        """Give the request's slot back; a failure to do so is the log's affair, the request has its tokens."""
        if active not in self._active:
            return
        self._active.remove(active)
        try:
            self.runner.close(active.slot)
        except Exception:
            _log.exception("the runner could not close slot %s", active.slot)

    def _end(self, handle: RequestHandle, reason: FinishReason, error: ServingError | None = None) -> None:
        if handle.done:
            return
        with self._state:
            self._count.finish(reason)
        try:
            handle.end(reason, error)
        except Exception:
            _log.exception("a request's on_event callback failed")

    def stats(self) -> Stats:
        """Gauges and counters, for metrics; `dataclasses.asdict` makes a dictionary of them."""
        with self._state:
            return self._count.stats(len(self._queue), len(self._active), self.runner.num_slots, self.max_queue)
