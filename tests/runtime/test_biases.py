"""Biases of tokens, and the most probable tokens that are reported beside the chosen one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.runtime import RequestError, SamplingParams, Scheduler
from engines.runtime.sampler import Sampler, log_probability, most_probable
from engines.runtime.sampling import MAX_BIASES
from tests.doubles.numpy_runner import NumpyRunner

LARGEST = float(np.finfo(np.float32).max)
rows = st.lists(st.sampled_from([-np.inf, -3.0, 0.0, 0.25, 1.0, 1.0, 7.5]), min_size=1, max_size=30)


def sample(logits: list[float], **options: Any) -> int:
    return Sampler(SamplingParams(**options), [], len(logits)).sample(np.array(logits, np.float32))[0]


def test_a_bias_is_added_to_the_logits() -> None:
    logits = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    for biases in ({0: 2.5, 3: -1}, [(0, 2.5), (3, -1)], zip(np.array([0, 3]), np.array([2.5, -1], np.float32), strict=True)):
        params = SamplingParams(logit_bias=biases)
        assert params.biases == params.logit_bias == ((0, 2.5), (3, -1.0))
        assert Sampler(params, [], 4)._adjust(logits).tolist() == [3.5, 2.0, 3.0, 3.0]
    assert logits.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_bias_acts_on_greedy_and_on_drawn_tokens_before_temperature() -> None:
    assert sample([1.0, 2.0], logit_bias={0: 1.5}) == 0
    params = SamplingParams(temperature=2.0, logit_bias={0: 2.0})
    sampler = Sampler(params, [], 2)
    ids, weights = sampler.candidates(sampler._adjust(np.zeros(2, np.float32)))
    assert ids.tolist() == [0, 1] and weights[0] / weights[1] == pytest.approx(np.exp(2.0 / 2.0))


def test_a_bias_comes_before_the_penalties() -> None:
    sampler = Sampler(SamplingParams(logit_bias={0: 3.0}, repetition_penalty=2.0), [0], 2)
    assert sampler._adjust(np.array([1.0, 0.0], np.float32)).tolist() == [2.0, 0.0]


def test_no_bias_makes_a_logit_that_is_not_finite() -> None:
    sampler = Sampler(SamplingParams(logit_bias={0: 1e300, 1: -1e300}), [], 3)
    assert sampler._adjust(np.array([LARGEST, -LARGEST, 0.0], np.float32)).tolist() == [LARGEST, -LARGEST, 0.0]
    assert sample([0.0, 1.0], logit_bias={0: -1e300, 1: -1e300}) == 0  # no token is forbidden by a bias


def test_reported_probabilities_are_the_models_own() -> None:
    row = np.array([1.0, 2.0, 0.0], np.float32)
    scheduler = Scheduler(NumpyRunner(3))
    scheduler.runner.override = row  # type: ignore[attr-defined]
    params = SamplingParams(max_new_tokens=2, logprobs=True, top_logprobs=2, logit_bias={2: 9.0}, temperature=0.0)
    handle = scheduler.submit([1], params)
    events, result = list(handle), handle.result()
    wanted = tuple((token, pytest.approx(log_probability(row, token))) for token in (1, 0))
    assert [event.token for event in events] == [2, 2] and all(event.top_logprobs == wanted for event in events)
    assert result.top_logprobs == [wanted, wanted] and result.logprobs == pytest.approx([log_probability(row, 2)] * 2)
    assert scheduler.submit([1], SamplingParams(max_new_tokens=2)).result().top_logprobs == []


@settings(deadline=None, max_examples=200)
@given(row=rows.filter(lambda row: max(row) > -np.inf), count=st.integers(1, 20))
def test_the_most_probable_tokens_fall_and_ties_go_by_id(row: list[float], count: int) -> None:
    logits = np.array(row, np.float32)
    top = most_probable(logits, count)
    assert [token for token, _ in top] == sorted(range(len(row)), key=lambda token: (-row[token], token))[:count]
    exact = logits.astype(np.float64)
    reference = exact - np.logaddexp.reduce(exact)
    assert [value for _, value in top] == pytest.approx([reference[token] for token, _ in top], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {0: float("nan")}}, "a number in logit_bias is out of range: expected a finite number"),
        ({"logit_bias": {0: "x"}}, "a number in logit_bias is not a number"),
        ({"logit_bias": {"a": 1}}, "a token id in logit_bias is not an integer"),
        ({"logit_bias": {-1: 1}}, "logit_bias is out of range: expected token ids of at least 0"),
        ({"logit_bias": [(1, 2), (1, 3)]}, "logit_bias is out of range: expected each token once"),
        ({"logit_bias": [1, 2]}, "logit_bias is not pairs"),
        ({"logit_bias": "ab"}, "logit_bias is not pairs"),
        ({"logit_bias": 3}, "logit_bias is not pairs"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIASES + 1), 1)}, f"expected at most {MAX_BIASES} tokens"),
        ({"top_logprobs": 21}, "top_logprobs is out of range: expected 0 to 20"),
        ({"top_logprobs": -1}, "top_logprobs is out of range"),
        ({"top_logprobs": True}, "top_logprobs is not an integer"),
        ({"guide": {"type": "object"}}, "guide is not a Guide"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**options)
    assert message in str(error.value)


def test_a_bias_of_a_token_that_the_model_does_not_have() -> None:
    SamplingParams(logit_bias={22: 1}).check_vocabulary(23)
    with pytest.raises(RequestError, match="logit_bias is out of range: expected token ids below 23, found 23"):
        SamplingParams(logit_bias={23: 1}).check_vocabulary(23)


def test_params_are_values() -> None:
    assert SamplingParams(logit_bias={1: 2}) == SamplingParams(logit_bias=[(1, 2.0)])
    assert hash(SamplingParams(logit_bias={1: 2})) == hash(SamplingParams(logit_bias=((1, 2.0),)))
