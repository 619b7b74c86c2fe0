"""How a request wants its tokens chosen: a validated, immutable record."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from .errors import RequestError
from .guide import Guide

TokenSequences = tuple[tuple[int, ...], ...]
MAX_SEQUENCES = 4096
"""More stop or bad sequences than this are refused: each costs time at every step."""
MAX_BIASES = 1024
"""More tokens than these cannot have a bias."""
MAX_TOP_LOGPROBS = 20
MAX_COUNT = (1 << 31) - 1
"""The largest count, which is what the serving interface can carry."""


@dataclass(frozen=True)
class SamplingParams:
    """Options of one request.

    Greedy when ``temperature`` is 0, or ``top_k`` is 1, or none of temperature, top_k, top_p, min_p is given. Otherwise
    penalties, then temperature, then top_k, then top_p, then min_p apply in that order (as in Hugging Face), and a token is
    drawn with a generator of the request's own, so that neighbours in the batch cannot change what it gets.

    Args:
        max_new_tokens: the most tokens that are made.
        temperature: divides the logits; 0 is greedy.
        top_k: so many of the most probable tokens are drawn from; 0 is no limit. Tokens that tie with the k-th stay.
        top_p: the most probable tokens that together have this probability are drawn from; above 0, 1 is no limit.
        min_p: tokens with less than this share of the largest probability are not drawn (arXiv:2407.01082); 0 is no limit.
        repetition_penalty: logits of tokens in prompt or output are divided by it when positive, multiplied when negative
            (Hugging Face; CTRL paper). 1 is neutral.
        presence_penalty: subtracted once from each distinct token of the output (OpenAI). The prompt does not count. 0 is
            neutral.
        frequency_penalty: subtracted from a token once per occurrence in the output (OpenAI). 0 is neutral.
        min_new_tokens: the first so many tokens cannot be end tokens, and stop sequences do not stop before so many are out.
        stop_sequences: token sequences; the request ends with "stop" when its output ends in one of these.
        bad_sequences: token sequences; the last token of each is impossible when it would complete the sequence, which may
            begin in the prompt.
        seed: of the request's random generator, an unsigned 64-bit number; None draws one from the system.
        eos_token_ids: the tokens that end a text.
        ignore_eos: whether to go on after an end token.
        logprobs: whether to report each token's natural-log probability under the model itself, before penalties, temperature and
            truncation.
        top_logprobs: so many of the most probable tokens are reported at each new token, with their natural-log probabilities
            under the model itself, as in ``logprobs``; 0 is none.
        logit_bias: token ids and the numbers that are added to their logits before everything else, the choice of greedy
            included: a mapping, or pairs. Stored as a tuple of pairs.
        guide: what the output must be. It ends by "stop" when nothing can follow; end tokens are possible where it may end.
            A guide that can only end does so before ``min_new_tokens`` too.
        return_context_logits: whether to keep the model's own logits of every position of the prompt.
        return_generation_logits: whether to keep the model's own logits from which each token was chosen.

    Raises:
        RequestError: a value that makes no sense; the text names the option.
    """

    max_new_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    stop_sequences: TokenSequences = ()
    bad_sequences: TokenSequences = ()
    seed: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = ()
    guide: Guide | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens", "top_k", "top_logprobs", "seed"):
            self._set(name, _integer(name, getattr(self, name), optional=name in ("top_k", "seed")))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._set(name, _number(name, getattr(self, name), optional=name in ("temperature", "top_p", "min_p")))
        for name in ("ignore_eos", "logprobs", "return_context_logits", "return_generation_logits"):
            self._set(name, _boolean(name, getattr(self, name)))
        for name in ("stop_sequences", "bad_sequences"):
            self._set(name, _sequences(name, getattr(self, name)))
        self._set("eos_token_ids", _token_ids("eos_token_ids", self.eos_token_ids))
        self._set("logit_bias", _biases(self.logit_bias))
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise RequestError("guide is not a Guide", expected="a Guide or None", found=_shown(self.guide))

        most = self.max_new_tokens
        _check("max_new_tokens", most, 0 < most <= MAX_COUNT, f"1 to {MAX_COUNT}")
        _check("min_new_tokens", self.min_new_tokens, self.min_new_tokens >= 0, "at least 0")
        _check("min_new_tokens", self.min_new_tokens, self.min_new_tokens <= most, f"at most max_new_tokens ({most})")
        _check("temperature", self.temperature, self.temperature is None or self.temperature >= 0, "at least 0")
        _check("top_k", self.top_k, self.top_k is None or 0 <= self.top_k <= MAX_COUNT, f"0 to {MAX_COUNT} (0 is no limit)")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "0 to 1 (0 is neutral)")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1 is neutral)")
        _check("top_logprobs", self.top_logprobs, 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "an unsigned 64-bit integer")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        given = any(value is not None for value in (self.temperature, self.top_k, self.top_p, self.min_p))
        return not given or self.temperature == 0 or self.top_k == 1

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias``, as it is stored."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Names of all options."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_options(cls, **options: Any) -> SamplingParams:
        """Like the constructor, but an option that does not exist is a RequestError naming it."""
        unknown = sorted(set(options) - set(cls.option_names()))
        if unknown:
            raise RequestError(
                f"unsupported option {', '.join(unknown)}",
                expected=f"some of {', '.join(cls.option_names())}",
                remedy="Leave it out.",
            )
        return cls(**options)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError when an option names a token id the model does not have."""
        named = [("eos_token_ids", self.eos_token_ids)]
        named += [("stop_sequences", sequence) for sequence in self.stop_sequences]
        named.append(("logit_bias", tuple(token for token, _ in self.biases)))
        named += [("bad_sequences", sequence) for sequence in self.bad_sequences]
        for name, tokens in named:
            worst = max(tokens, default=0)
            _check(name, worst, worst < vocab_size, f"token ids below {vocab_size}")


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise RequestError(f"{name} is out of range", expected=expected, found=_shown(value))


def _integer(name: str, value: Any, *, optional: bool) -> int | None:
    if value is None and optional:
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise RequestError(f"{name} is not an integer", expected="an integer", found=_shown(value)) from None


def _number(name: str, value: Any, *, optional: bool) -> float | None:
    if value is None and optional:
        return None
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{name} is not a number", expected="a number", found=_shown(value)) from None
    _check(name, value, math.isfinite(number), "a finite number")
    return number


def _boolean(name: str, value: Any) -> bool:
    # numpy's bool is not a bool, but says what it is through its dtype.
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "") == "b":
        return bool(value)
    raise RequestError(f"{name} is not a boolean", expected="True or False", found=_shown(value))


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} is not a list of token ids", expected="token ids", found=_shown(value))
    tokens = tuple(_integer(f"a token id in {name}", token, optional=False) or 0 for token in value)
    lowest = min(tokens, default=0)
    _check(name, lowest, lowest >= 0, "token ids of at least 0")
    return tokens


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        if isinstance(pairs, str | bytes):
            raise TypeError
        found = [(token, bias) for token, bias in pairs]
    except (TypeError, ValueError):
        raise RequestError("logit_bias is not pairs", expected="token ids with numbers", found=_shown(value)) from None
    _check("logit_bias", f"{len(found)} tokens", len(found) <= MAX_BIASES, f"at most {MAX_BIASES} tokens")
    tokens = _token_ids("logit_bias", [token for token, _ in found])
    _check("logit_bias", "a token twice", len(set(tokens)) == len(tokens), "each token once")
    numbers = [_number("a number in logit_bias", bias, optional=False) or 0.0 for _, bias in found]
    return tuple(zip(tokens, numbers, strict=True))


def _sequences(name: str, value: Any) -> TokenSequences:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} is not a list of token sequences", expected="lists of token ids", found=_shown(value))
    sequences = tuple(_token_ids(name, sequence) for sequence in value)
    _check(name, "an empty sequence", all(sequences), "sequences of at least one token")
    _check(name, f"{len(sequences)} sequences", len(sequences) <= MAX_SEQUENCES, f"at most {MAX_SEQUENCES}")
    return sequences


def _shown(value: object) -> str:
    try:
        return (str if isinstance(value, int | float) else repr)(value)[:200]
    except ValueError:  # an integer of more digits than Python spells
        return f"a value of type {type(value).__name__}"
