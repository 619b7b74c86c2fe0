"""One request as its caller sees it: a handle that yields tokens, can be waited for, and can be cancelled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from .errors import Cancelled, ServingError
from .events import NO_TOKEN, CancelReason, FinishReason, Result, Times, TokenEvent
from .guidance import GuideMatcher
from .runner import Logits, Tokens
from .sampling import SamplingParams

_GLANCE = 0.2  # seconds: every wait is bounded, so that a scheduler stopped meanwhile is noticed


class Worker(Protocol):
    """Who works on a request, as far as its handle needs to know: `Scheduler`."""

    @property
    def running(self) -> bool:
        """Whether a thread of its own takes the steps."""

    def step(self) -> object:
        """Take one step, in the caller's thread."""

    def wake(self) -> None:
        """Look at the requests again."""


class RequestHandle:
    """What `Scheduler.submit` returns. Safe to use from any thread.

    Iterating yields every `TokenEvent` from the first, waiting for those still to come; several iterators may
    run. After the last event it stops, or raises the request's error when the request failed.
    """

    def __init__(
        self,
        scheduler: Worker,
        prompt: Tokens,
        params: SamplingParams,
        on_event: Callable[[TokenEvent], None] | None = None,
        *,
        read_only: bool = False,
        guide: GuideMatcher | None = None,
    ) -> None:
        self.prompt, self.params, self.read_only, self.guide = prompt, params, read_only, guide
        self.error: ServingError | None = None
        self.owner: object = None  # kept alive as long as the handle: an engine stops when nothing refers to it
        self._scheduler, self._on_event = scheduler, on_event
        self._changed = threading.Condition()
        self._finished = threading.Event()  # who waits for the end need not be woken for every token
        self._events: list[TokenEvent] = []
        self._context: list[Logits] = []
        self._arrival, self._scheduled, self._first, self._last = time.monotonic_ns(), 0, 0, 0
        self._cancelled: CancelReason | None = None
        self._done = False

    # The caller's side.

    def __iter__(self) -> Iterator[TokenEvent]:
        place = 0
        while (event := self._event(place)) is not None:
            yield event
            place += 1
        if self.error is not None:
            raise self.error

    def cancel(self, reason: CancelReason = "cancelled") -> None:
        """Ask for the request to end, at any time and any number of times.

        Its slot is free on return, or, when a step is under way just now, before the next one. `reason` "stop" is
        for a caller that has all it wanted (a stop string in the text): the request then counts as completed.
        """
        if not self._done:
            self._cancelled = self._cancelled or reason
            self._scheduler.wake()

    def result(self, timeout: float | None = None) -> Result:
        """Wait until the request is done.

        Raises Cancelled when it was cancelled, its own error when it failed, TimeoutError after `timeout` seconds.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"the request is not done after {timeout} seconds")
        if self.error is not None:
            raise self.error
        reason = self.finish_reason
        if reason is None or reason == "cancelled":
            raise Cancelled("the request was cancelled", found=f"{len(self.tokens)} tokens so far")
        with self._changed:
            events = [event for event in self._events if event.has_token]
        rows = [event.logits for event in events if event.logits is not None]
        return Result(
            tokens=[event.token for event in events],
            logprobs=[event.logprob for event in events if event.logprob is not None],
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            times=self.times,
            context_logits=self.context_logits,
            generation_logits=np.stack(rows) if rows else None,
            top_logprobs=[event.top_logprobs for event in events if event.top_logprobs],
        )

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the request is done or `timeout` seconds have passed; returns whether it is done."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._done:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            if self._scheduler.running:
                self._finished.wait(_GLANCE if left is None else min(left, _GLANCE))
            else:
                self._scheduler.step()
        return True

    @property
    def done(self) -> bool:
        """Whether the last event has happened."""
        return self._done

    @property
    def tokens(self) -> list[int]:
        """The tokens so far."""
        with self._changed:
            return [event.token for event in self._events if event.has_token]

    @property
    def finish_reason(self) -> FinishReason | None:
        """How the request ended, or None while it runs."""
        with self._changed:
            return self._events[-1].finish_reason if self._events else None

    @property
    def times(self) -> Times:
        """When the request arrived, was first given a slot, and got its first and last token."""
        return Times(self._arrival, self._scheduled, self._first, self._last)

    @property
    def context_logits(self) -> Logits | None:
        """Float32 [T, V] of every prompt position once the prompt is read, when asked for; otherwise None."""
        with self._changed:
            return np.concatenate(self._context) if sum(map(len, self._context)) == len(self.prompt) else None

    def _event(self, place: int) -> TokenEvent | None:
        while True:
            with self._changed:
                if place < len(self._events):
                    return self._events[place]
                if self._done:
                    return None
            if not self._scheduler.running:  # without a thread of its own, whoever waits takes the steps
                self._scheduler.step()
                continue
            with self._changed:
                if place == len(self._events) and not self._done:
                    self._changed.wait(_GLANCE)

    # The scheduler's side.

    @property
    def cancel_reason(self) -> CancelReason | None:
        """Why `cancel` was called, or None when it was not."""
        return self._cancelled

    def mark_scheduled(self) -> None:
        """Note the moment the request got a slot."""
        self._scheduled = self._scheduled or time.monotonic_ns()

    def add_context(self, logits: Logits) -> None:
        """Keep float32 [T', V] of the next prompt positions."""
        with self._changed:
            self._context.append(logits)

    def emit(self, event: TokenEvent) -> None:
        """Deliver an event; one with a finish reason is the last."""
        with self._changed:
            if self._done:
                return
            if event.has_token:
                self._last = time.monotonic_ns()
                self._first = self._first or self._last
            self._events.append(event)
            self._done = event.finish_reason is not None
            if self._done:
                self._finished.set()
            self._changed.notify_all()
        if self._on_event is not None:
            self._on_event(event)

    def end(self, reason: FinishReason, error: ServingError | None = None) -> None:
        """End the request without another token."""
        self.error = self.error or error
        self.emit(TokenEvent(NO_TOKEN, len(self.tokens), finish_reason=reason))
