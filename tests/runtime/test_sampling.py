"""Each step from logits to a token against a reference written out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from engines.runtime import RequestError, SamplingParams, Scheduler
from engines.runtime.sampling import Sampler
from tests.doubles.numpy_runner import NumpyRunner


def generate(prompt: list[int], runner: NumpyRunner | None = None, **options: Any) -> list[int]:
    return Scheduler(runner or NumpyRunner()).submit(prompt, SamplingParams(**options)).result()


def penalised(prompt: list[int], count: int, repetition: float, presence: float, frequency: float) -> list[int]:
    """Loops over single tokens and the textbook formulas."""
    runner, generated = NumpyRunner(), []
    for _ in range(count):
        scores = [float(x) for x in runner.reference([*prompt, *generated])[-1]]
        for token in range(23):
            if token in prompt or token in generated:
                scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
            times = generated.count(token)
            scores[token] -= frequency * times + (presence if times else 0.0)
        generated.append(scores.index(max(scores)))
    return generated


@pytest.mark.parametrize(
    ("repetition", "presence", "frequency"),
    [(1.3, 0, 0), (0.7, 0, 0), (1, 0.8, 0), (1, -0.5, 0), (1, 0, 0.6), (1.2, 0.4, 0.3)],
)
def test_penalties(repetition: float, presence: float, frequency: float) -> None:
    for prompt in ([1, 2, 3], [9], [4, 4, 20]):
        found = generate(
            prompt, max_new_tokens=25, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
        )
        assert found == penalised(prompt, 25, repetition, presence, frequency)


def test_penalties_change_something() -> None:
    plain = generate([1, 2, 3], max_new_tokens=25)
    for option in ({"repetition_penalty": 1.3}, {"presence_penalty": 0.8}, {"frequency_penalty": 0.6}):
        assert generate([1, 2, 3], max_new_tokens=25, **option) != plain


def test_end_tokens_minimum_and_ignoring() -> None:
    plain = generate([1, 2], max_new_tokens=10)
    end = plain[3]
    first = plain.index(end)
    request = Scheduler(NumpyRunner()).submit([1, 2], SamplingParams(max_new_tokens=10, eos_token_ids=(end,)))
    assert request.result() == plain[: first + 1] and request.finish_reason == "eos"
    assert generate([1, 2], max_new_tokens=10, eos_token_ids=(end,), ignore_eos=True) == plain
    late = generate([1, 2], max_new_tokens=10, eos_token_ids=(end,), min_new_tokens=7)
    assert end not in late[:7] and len(late) >= 7 and late[:first] == plain[:first]


def test_length_is_the_last_reason() -> None:
    events = list(Scheduler(NumpyRunner()).submit([1], SamplingParams(max_new_tokens=3)))
    assert [e.finish_reason for e in events] == [None, None, "length"]


def test_stop_sequences() -> None:
    plain = generate([1, 2], max_new_tokens=12)
    stop = tuple(plain[4:6])
    at = next(i for i in range(2, 13) if tuple(plain[i - 2 : i]) == stop)
    request = Scheduler(NumpyRunner()).submit([1, 2], SamplingParams(max_new_tokens=12, stop_sequences=(stop, (22, 22, 22))))
    assert request.result() == plain[:at] and request.finish_reason == "stop"
    assert len(generate([1, 2], max_new_tokens=12, stop_sequences=(stop,), min_new_tokens=at + 1)) > at


def test_a_stop_sequence_in_the_prompt_does_not_count() -> None:
    plain = generate([1, 2], max_new_tokens=4)
    found = generate([1, 2], max_new_tokens=4, stop_sequences=((2, plain[0]),))
    assert found == plain


def test_bad_sequences_are_never_completed() -> None:
    plain = generate([1, 2], max_new_tokens=12)
    single, pair, crossing = (plain[2],), (plain[4], plain[5]), (2, plain[0])
    assert single[0] not in generate([1, 2], max_new_tokens=12, bad_sequences=(single,))
    found = generate([1, 2], max_new_tokens=12, bad_sequences=(pair,))
    assert pair not in list(zip(found, found[1:], strict=False)) and found[:5] == plain[:5]
    assert generate([1, 2], max_new_tokens=1, bad_sequences=(crossing,)) != plain[:1]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 0}])
def test_banning_everything_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="at least one token left"):
        generate([1], bad_sequences=tuple((t,) for t in range(23)), **options)


def test_seeds() -> None:
    one = generate([1, 2], max_new_tokens=20, temperature=1.5, seed=5)
    assert one == generate([1, 2], max_new_tokens=20, temperature=1.5, seed=5)
    assert any(one != generate([1, 2], max_new_tokens=20, temperature=1.5, seed=s) for s in range(6, 10))
    runs = {tuple(generate([1, 2], max_new_tokens=20, temperature=5.0)) for _ in range(5)}
    assert len(runs) > 1  # without a seed, each request has its own


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0, "top_p": 0.5}, {"top_k": 1, "temperature": 3.0}])
def test_greedy_settings(options: dict[str, Any]) -> None:
    assert SamplingParams(**options).greedy
    assert generate([3, 4], max_new_tokens=9, **options) == generate([3, 4], max_new_tokens=9)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 0}])
def test_sampled_settings(options: dict[str, Any]) -> None:
    assert not SamplingParams(**options).greedy


LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ({"temperature": 0.5}, [x**2 / 0.3359375 for x in (0.5, 0.25, 0.125, 0.0625, 0.0625)]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_k": 4}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),  # the last two tie
        ({"top_k": 99}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),
    ],
)
def test_sampled_frequencies(options: dict[str, Any], expected: list[float]) -> None:
    draws = 6000
    params = SamplingParams(max_new_tokens=draws, seed=11, **options)
    sampler = Sampler(params, np.array([0]), 5)
    counts = np.bincount([sampler.pick(LOGITS)[0] for _ in range(draws)], minlength=5)
    assert not counts[np.array(expected) == 0].any()
    np.testing.assert_allclose(counts / draws, expected, atol=4 * 0.5 / math.sqrt(draws))


def test_logprobs_are_the_models_own() -> None:
    params = SamplingParams(max_new_tokens=5, logprobs=True, repetition_penalty=1.5, temperature=0.7, seed=1)
    events = list(Scheduler(NumpyRunner()).submit([1, 2], params))
    tokens = [1, 2]
    for event in events:
        row = NumpyRunner().reference(tokens)[-1].astype(np.float64)
        expected = row[event.token] - math.log(sum(math.exp(x) for x in row))
        assert event.logprob == pytest.approx(expected, abs=1e-9)
        tokens.append(event.token)
    assert next(iter(Scheduler(NumpyRunner()).submit([1], SamplingParams()))).logprob is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 33}, "min_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": None}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop_sequences": ((),)}, "stop_sequences"),
        ({"stop_sequences": 3}, "stop_sequences"),
        ({"bad_sequences": (("a",),)}, "bad_sequences"),
        ({"eos_token_ids": 2}, "eos_token_ids"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"logprobs": "yes"}, "logprobs"),
    ],
)
def test_bad_options(options: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**options)
    assert caught.value.what == name and caught.value.expected and caught.value.found


@pytest.mark.parametrize("name", ["stop_sequences", "bad_sequences"])
def test_sequences_outside_the_vocabulary(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name}\[1\]: expected a token id in 0\.\.22, found 23"):
        generate([1], **{name: ((1, 23),)})


def test_end_tokens_outside_the_vocabulary() -> None:
    with pytest.raises(RequestError, match="eos_token_ids"):
        generate([1], eos_token_ids=(23,))
