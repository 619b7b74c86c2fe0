"""How one request is continued: validated options.

Order of the steps: repetition penalty, presence and frequency penalties, bad sequences, minimum length,
then (when sampling) temperature, top-k, top-p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import RequestError

TokenSequences = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SamplingParams:
    """How one request is continued. Raises RequestError on a bad value.

    max_new_tokens: most tokens to generate, at least 1; min_new_tokens: neither an end token is picked nor a
        stop sequence obeyed before this many.
    temperature, top_k, top_p: the choice is greedy (argmax) when temperature is 0, or top_k is 1, or none of
        the three is given; otherwise it is sampled, with temperature 1 unless given. top_k 0: no limit. Tokens
        that tie with the k-th stay. top_p keeps the fewest most likely tokens whose probability reaches it.
    repetition_penalty: as in Hugging Face, over prompt and generated tokens (positive logits are divided,
        negative ones multiplied); presence_penalty, frequency_penalty: as OpenAI defines them, over generated
        tokens: logit - presence * (count > 0) - frequency * count.
    stop_sequences: generation ends when the generated tokens end with one (it is part of the output);
        bad_sequences: never completed, counted over prompt and generated tokens.
    seed: 0..2**64-1; the same request with the same seed gives the same tokens whatever else is running.
    eos_token_ids: generation ends at one of these (it is part of the output), unless ignore_eos.
    logprobs: give each token's natural log-probability under the model's own logits, before the steps above.
    return_context_logits, return_generation_logits: keep the logits of the prompt, of each generated token.
    """

    max_new_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
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
    return_context_logits: bool = False
    return_generation_logits: bool = False

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1, None)
        _integer("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        if self.temperature is not None:
            _number("temperature", self.temperature, low=0.0)
        if self.top_k is not None:
            _integer("top_k", self.top_k, 0, None)
        if self.top_p is not None:
            _number("top_p", self.top_p, above=0.0, high=1.0)
        _number("repetition_penalty", self.repetition_penalty, above=0.0)
        _number("presence_penalty", self.presence_penalty)
        _number("frequency_penalty", self.frequency_penalty)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        for name in ("ignore_eos", "logprobs", "return_context_logits", "return_generation_logits"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, "true or false", getattr(self, name))
        for name in ("stop_sequences", "bad_sequences"):
            object.__setattr__(self, name, _sequences(name, getattr(self, name)))
        object.__setattr__(self, "eos_token_ids", _tokens("eos_token_ids", self.eos_token_ids))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken rather than a sampled one."""
        given = (self.temperature, self.top_k, self.top_p)
        return self.temperature == 0 or self.top_k == 1 or all(value is None for value in given)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises RequestError unless every token id of these options is below `vocab_size`."""
        named = [("eos_token_ids", self.eos_token_ids)]
        named += [(name, s) for name in ("stop_sequences", "bad_sequences") for s in getattr(self, name)]
        for name, tokens in named:
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        name,
                        expected=f"token ids in 0..{vocab_size - 1}",
                        found=str(token),
                        remedy="Use the tokenizer that belongs to this model.",
                    )


def _bad(name: str, expected: str, found: object) -> RequestError:
    return RequestError(name, expected=expected, found=repr(found)[:200], remedy="Correct the request.")


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    limits = f"an integer of at least {low}" if high is None else f"an integer in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise _bad(name, limits, value)


def _number(name: str, value: object, *, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> None:
    wanted = "a finite number"
    if above > -math.inf or low > -math.inf:
        wanted += f" above {above}" if above > -math.inf else f" of at least {low}"
    if high < math.inf:
        wanted += f" and at most {high}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(name, wanted, value)
    if value < low or value <= above or value > high:
        raise _bad(name, wanted, value)


def _tokens(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(t, int) and not isinstance(t, bool) for t in value):
        raise _bad(name, "a list of integer token ids", value)
    return tuple(value)


def _sequences(name: str, value: object) -> TokenSequences:
    if not isinstance(value, list | tuple):
        raise _bad(name, "a list of token id lists", value)
    result = tuple(_tokens(name, item) for item in value)
    if any(not item for item in result):
        raise _bad(name, "sequences of at least one token", value)
    return result
