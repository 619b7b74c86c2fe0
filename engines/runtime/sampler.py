"""Choosing one request's next token from a row of logits, in NumPy, fast on a vocabulary of 131072."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import RequestError, RunnerError
from .events import FinishReason
from .guidance import GuideMatcher
from .sampling import SamplingParams

Row = NDArray[np.float32]
_FIRST_NUCLEUS = 256
"""Candidates tried first for top_p. Most nuclei are far smaller than this, and a full sort is far slower."""


class Sampler:
    """The state of one request's choices: its generator, and which tokens it has seen.

    ``sample`` takes float32 [V] and returns the token and, when asked for, its log-probability; it never changes
    its argument. Raises RunnerError for logits that are not numbers, RequestError when every token is forbidden.
    ``guide`` is the matcher of ``params.guide``, which goes on with each token.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, guide: GuideMatcher | None = None) -> None:
        self.params = params
        self._guide, self._complete = guide, False
        self.output: list[int] = []
        self._random = None if params.greedy else np.random.Generator(np.random.PCG64(params.seed))
        self._eos = np.array([] if params.ignore_eos else params.eos_token_ids, dtype=np.int64)
        self._banned = np.array(sorted({s[0] for s in params.bad_sequences if len(s) == 1}), dtype=np.int64)
        self._phrases = [sequence for sequence in params.bad_sequences if len(sequence) > 1]
        self._biased = np.array([token for token, _ in params.biases], dtype=np.int64)
        self._biases = np.array([bias for _, bias in params.biases], dtype=np.float64)
        reach = max((len(sequence) for sequence in self._phrases), default=1) - 1
        self._history = list(prompt[len(prompt) - reach :]) if reach else []
        self._reach = reach
        self._repeats = params.repetition_penalty != 1.0
        self._counts_matter = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        # Which ids to penalise, as sets that only grow; dense tables would cost a pass over V per step.
        self._seen = dict.fromkeys(prompt) if self._repeats else {}
        self._counts: dict[int, int] = {}

    def sample(self, logits: Row) -> tuple[int, float | None]:
        """Choose a token from float32 [V], remember it, and return it with its log-probability (or None)."""
        adjusted = self._adjust(logits)
        token = int(np.argmax(adjusted))
        if not np.isfinite(adjusted[token]):
            self._refuse(logits)
        if self._random is not None:
            token = self._draw(adjusted, self._random)
        logprob = log_probability(logits, token) if self.params.logprobs else None
        self._remember(token)
        return token, logprob

    def finish_reason(self) -> FinishReason | None:
        """Why the output ends with the token chosen last: "eos", "stop", "length", or None when it does not.

        "stop" is a stop sequence, or a guide after which nothing can follow.
        """
        params, output = self.params, self.output
        if output[-1] in params.eos_token_ids and not params.ignore_eos:
            return "eos"
        if self._complete or (len(output) >= params.min_new_tokens and self.stop_match()):
            return "stop"
        return "length" if len(output) >= params.max_new_tokens else None

    def stop_match(self) -> tuple[int, ...]:
        """The longest stop sequence that the output ends in; empty when there is none."""
        fitting = (s for s in self.params.stop_sequences if tuple(self.output[-len(s) :]) == s)
        return max(fitting, key=len, default=())

    def _adjust(self, logits: Row) -> Row:
        """Logits with biases, penalties, bans and the guide; the very same array when there are none."""
        forbidden, guide = self._forbidden(), self._guide
        penalised = self._repeats or (self._counts_matter and self._counts)
        if not (penalised or len(forbidden) or len(self._biased) or guide is not None):
            return logits
        out = logits.astype(np.float32, copy=True)
        # In float64 and clipped, so that no bias and no penalty, however extreme, turns a logit into Inf or NaN.
        if len(self._biased):
            out[self._biased] = _finite(out[self._biased].astype(np.float64) + self._biases)
        if self._repeats:
            ids = np.fromiter(self._seen, dtype=np.int64, count=len(self._seen))
            values, penalty = out[ids].astype(np.float64), self.params.repetition_penalty
            out[ids] = _finite(np.where(values < 0, values * penalty, values / penalty))
        if self._counts_matter and self._counts:
            ids = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
            counts = np.fromiter(self._counts.values(), dtype=np.float64, count=len(self._counts))
            penalties = self.params.presence_penalty + self.params.frequency_penalty * counts
            out[ids] = _finite(out[ids].astype(np.float64) - penalties)
        if guide is not None:
            possible = guide.allowed()
            ends = self._eos if guide.accepting else self._eos[:0]
            kept = out[ends]
            out[~possible] = -np.inf
            out[ends] = kept
        out[forbidden] = -np.inf
        return out

    def _forbidden(self) -> NDArray[np.int64]:
        parts = [self._banned]
        if len(self.output) < self.params.min_new_tokens:
            parts.append(self._eos)
        completing = [s[-1] for s in self._phrases if tuple(self._history[-(len(s) - 1) :]) == s[:-1]]
        if completing:
            parts.append(np.array(completing, dtype=np.int64))
        return np.concatenate(parts)

    def candidates(self, logits: Row) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens that can be drawn from float32 [V], and their probabilities up to a factor."""
        candidates, weights = _truncate(logits, self.params)
        if self.params.min_p:  # the most probable token stays, whatever the share
            kept = weights >= self.params.min_p * weights.max()
            candidates, weights = candidates[kept], weights[kept]
        return candidates, weights

    def _draw(self, logits: Row, random: np.random.Generator) -> int:
        candidates, weights = self.candidates(logits)
        cumulative = np.cumsum(weights)
        place = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
        # The product can round up to the very total; that belongs to the last candidate with any weight.
        place = min(place, int(np.searchsorted(cumulative, cumulative[-1], side="left")))
        return int(candidates[place])

    def _refuse(self, logits: Row) -> None:
        if np.isnan(logits).any() or np.isposinf(logits).any() or np.isneginf(logits).all():
            raise RunnerError(
                "the model's logits are not numbers",
                expected="finite values",
                found="NaN or Inf",
                remedy="Verify the engine against its checkpoint.",
            )
        raise RequestError(
            "every token is forbidden",
            expected="at least one token left to choose",
            remedy="Shorten bad_sequences, lower min_new_tokens" + (", or change the guide." if self._guide is not None else "."),
        )

    def _remember(self, token: int) -> None:
        self.output.append(token)
        if self._guide is not None and token not in self._eos:
            self._complete = self._guide.advance(token)
        if self._repeats:
            self._seen[token] = None
        if self._counts_matter:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._reach:
            self._history = [*self._history, token][-self._reach :]


def _finite(values: NDArray[np.float64]) -> Row:
    limit = float(np.finfo(np.float32).max)
    return np.clip(values, -limit, limit).astype(np.float32)


def log_probability(logits: Row, token: int) -> float:
    """Natural log of softmax(logits)[token], for float32 [V]."""
    peak = logits.max()
    total = np.exp(logits - peak).sum(dtype=np.float64)
    return float(logits[token]) - float(peak) - float(np.log(total))


def most_probable(logits: Row, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` most probable tokens of float32 [V], V at most, and their log_probability: falling, then by id."""
    ids = _largest(logits, min(count, len(logits)))  # in order of id, and a stable sort keeps that where logits tie
    ids = ids[np.argsort(-logits[ids], kind="stable")][:count]
    peak = float(logits.max())
    total = float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    return tuple((int(token), float(logits[token]) - peak - total) for token in ids)


def _truncate(logits: Row, params: SamplingParams) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Candidates left by temperature, top_k and top_p, and their unnormalised probabilities.

    Without top_p the candidates are in order of token id, with it in order of falling probability.
    """
    size = len(logits)
    temperature = 1.0 if params.temperature is None else params.temperature
    top_p = 1.0 if params.top_p is None else params.top_p
    limit = min(params.top_k or size, size)
    peak = logits.max()

    def weigh(values: Row) -> NDArray[np.float64]:
        # Differences first: they are at most 0, so a tiny temperature gives zeros and never Inf - Inf.
        with np.errstate(over="ignore", under="ignore"):
            weights: NDArray[np.float64] = np.exp((values.astype(np.float64) - float(peak)) / temperature)
        return weights

    if limit < size:
        ids = _largest(logits, limit)
        weights = weigh(logits[ids])
        return (ids, weights) if top_p == 1.0 else _nucleus(ids, weights, top_p * weights.sum())
    everything = weigh(logits)
    if top_p == 1.0:
        return np.arange(size), everything
    wanted, count = top_p * everything.sum(), _FIRST_NUCLEUS
    while count < size:
        ids = _largest(logits, count)
        if everything[ids].sum() >= wanted:
            return _nucleus(ids, everything[ids], wanted)
        count *= 8
    return _nucleus(np.arange(size), everything, wanted)


def _largest(logits: Row, count: int) -> NDArray[np.int64]:
    """Ids of the `count` largest logits in order of id; more where several share the last place."""
    threshold = np.partition(logits, len(logits) - count)[len(logits) - count]
    return np.flatnonzero(logits >= threshold)


def _nucleus(
    ids: NDArray[np.int64], weights: NDArray[np.float64], wanted: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The fewest most probable candidates that together weigh at least `wanted`."""
    order = np.argsort(-weights, kind="stable")
    cumulative = np.cumsum(weights[order])
    keep = min(int(np.searchsorted(cumulative, wanted, side="left")) + 1, len(order))
    return ids[order[:keep]], weights[order[:keep]]
