"""What happens to a request, as records: its tokens, its times, how it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .runner import Logits

FinishReason = Literal["eos", "stop", "length", "cancelled", "error"]
CancelReason = Literal["cancelled", "stop"]
TopLogprobs = tuple[tuple[int, float], ...]
NO_TOKEN = -1
"""The `token` of an event that only says how a request ended."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token, and on the last event how the request ended.

    ``index`` counts the request's tokens from 0. The eos token, and the tokens of a stop sequence, are delivered
    like any other; ``stop_sequence`` says which tokens at the end of the output made it stop. ``logits`` is the
    model's own float32 [V] row when return_generation_logits was asked. When a request ends by "cancelled" or
    "error" its last event carries no token: ``token`` is -1 (NO_TOKEN) and ``has_token`` is False.
    ``top_logprobs`` holds the most probable tokens under the model itself and their natural-log probabilities, falling (tokens
    that tie in order of id): as many as were asked for, or all that the model has.
    """

    token: int
    index: int
    logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_sequence: tuple[int, ...] = ()
    logits: Logits | None = None
    top_logprobs: TopLogprobs = ()

    @property
    def has_token(self) -> bool:
        """Whether the event brings a token."""
        return self.token != NO_TOKEN


@dataclass(frozen=True)
class Times:
    """Moments on the monotonic clock in nanoseconds; 0 for what has not happened."""

    arrival_ns: int
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0


@dataclass(frozen=True)
class Result:
    """A finished request. ``logprobs`` and ``top_logprobs`` have one entry per token when asked for, otherwise none."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt_tokens: int
    times: Times
    context_logits: Logits | None
    generation_logits: Logits | None
    top_logprobs: list[TopLogprobs] = field(default_factory=list)

    @property
    def cumulative_logprob(self) -> float:
        """Sum of the log-probabilities."""
        return float(sum(self.logprobs))
