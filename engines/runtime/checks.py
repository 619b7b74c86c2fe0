"""What goes into the scheduler and what comes out of its runner, held against what was agreed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import RequestError, RunnerError, ServingError
from .runner import Logits, Tokens


def as_tokens(prompt: Sequence[int] | Tokens, vocab_size: int) -> Tokens:
    """A prompt as int64 [T]. Raises RequestError unless it is a flat, non-empty list of token ids below vocab_size."""
    try:
        tokens = np.asarray(prompt)
    except ValueError:  # lists of different lengths
        tokens = np.empty((1, 0))
    if tokens.ndim != 1:
        raise RequestError(
            "the prompt is not a list of token ids",
            expected="one dimension",
            found=f"{tokens.ndim} dimensions",
            remedy="Pass one list of integers per request.",
        )
    if not len(tokens):
        raise RequestError("the prompt is empty", expected="at least one token", remedy="Begin with the bos token.")
    if tokens.dtype.kind not in "iu":
        raise RequestError("the prompt is not a list of token ids", expected="integers", found=str(tokens.dtype))
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise RequestError(
            "a token id is out of range",
            expected=f"0 to {vocab_size - 1}",
            found=str(low if low < 0 else high),
            remedy="Tokenise with the engine's own tokenizer.",
        )
    return tokens.astype(np.int64)


def check_room(prompt_tokens: int, new_tokens: int, limit: int) -> None:
    """Raise RequestError unless prompt and new tokens together fit `limit` tokens."""
    longest = limit - min(new_tokens, 1)
    if prompt_tokens > longest:
        raise RequestError(
            "the prompt is too long", expected=f"at most {longest} tokens", found=str(prompt_tokens), remedy="Shorten it."
        )
    if prompt_tokens + new_tokens > limit:
        raise RequestError(
            "prompt and new tokens together do not fit the engine",
            expected=f"at most {limit} tokens",
            found=f"{prompt_tokens} + {new_tokens}",
            remedy=f"Shorten the prompt, or ask for at most {limit - prompt_tokens} new tokens.",
        )


def check_shape(logits: Logits, wanted: tuple[int, ...]) -> None:
    """Raise RunnerError unless the logits have the shape `wanted`."""
    if np.shape(logits) != wanted:
        raise RunnerError("the runner's logits have the wrong shape", expected=str(wanted), found=str(np.shape(logits)))


def as_serving_error(what: str, cause: BaseException) -> ServingError:
    """A ServingError of its own for one request: several threads may raise what one cause brought about."""
    if isinstance(cause, ServingError):
        error = type(cause)(cause.what, expected=cause.expected, found=cause.found, remedy=cause.remedy)
        error.__cause__ = cause.__cause__
        return error
    error = RunnerError(what, found=f"{type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
