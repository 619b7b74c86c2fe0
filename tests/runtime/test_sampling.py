"""Each step from logits to a token against a reference written out by hand."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest

from engines.runtime import RequestError, SamplingParams, Scheduler
from engines.runtime.sampler import Sampler, log_probability
from tests.doubles.numpy_runner import NumpyRunner


def generate(prompt: list[int], runner: NumpyRunner | None = None, **options: Any) -> list[int]:
    return Scheduler(runner or NumpyRunner()).submit(prompt, SamplingParams(**options)).result().tokens


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
    [(1.3, 0, 0), (0.7, 0, 0), (1, 2.0, 0), (1, -0.5, 0), (1, 0, 2.0), (1.2, 0.9, 0.7)],
)
def test_penalties(repetition: float, presence: float, frequency: float) -> None:
    for prompt in ([1, 2, 3], [9], [4, 4, 20]):
        found = generate(
            prompt, max_new_tokens=25, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
        )
        assert found == penalised(prompt, 25, repetition, presence, frequency)


def test_penalties_change_something() -> None:
    plain = generate([1, 2, 3], max_new_tokens=25)
    for option in ({"repetition_penalty": 1.3}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert generate([1, 2, 3], max_new_tokens=25, **option) != plain


def test_end_tokens_minimum_and_ignoring() -> None:
    plain = generate([1, 2], max_new_tokens=10)
    end = plain[3]
    first = plain.index(end)
    request = Scheduler(NumpyRunner()).submit([1, 2], SamplingParams(max_new_tokens=10, eos_token_ids=(end,)))
    assert request.result().tokens == plain[: first + 1] and request.finish_reason == "eos"
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
    assert request.result().tokens == plain[:at] and request.finish_reason == "stop"
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


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 0}, {"min_p": 0.01}])
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
        ({"min_p": 0.49}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"min_p": 0.51}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.2, "top_k": 2}, [2 / 3, 1 / 3, 0, 0, 0]),
        ({"min_p": 0.2, "top_p": 0.8}, [4 / 7, 2 / 7, 1 / 7, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [2 / 3, 1 / 3, 0, 0, 0]),
    ],
)
def test_sampled_frequencies(options: dict[str, Any], expected: list[float]) -> None:
    draws = 6000
    params = SamplingParams(max_new_tokens=draws, seed=11, **options)
    sampler = Sampler(params, [0], 5)
    counts = np.bincount([sampler.sample(LOGITS)[0] for _ in range(draws)], minlength=5)
    assert not counts[np.array(expected) == 0].any()
    np.testing.assert_allclose(counts / draws, expected, atol=4 * 0.5 / math.sqrt(draws))


def test_logprobs_are_the_models_own() -> None:
    params = SamplingParams(max_new_tokens=5, logprobs=True, repetition_penalty=1.5, temperature=0.7, seed=1)
    events = list(Scheduler(NumpyRunner()).submit([1, 2], params))
    tokens = [1, 2]
    for event in events:
        row = NumpyRunner().reference(tokens)[-1].astype(np.float64)
        expected = row[event.token] - math.log(sum(math.exp(x) for x in row))
        assert event.logprob == pytest.approx(expected, abs=1e-6)
        tokens.append(event.token)
    assert next(iter(Scheduler(NumpyRunner()).submit([1], SamplingParams()))).logprob is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -3}, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"max_new_tokens": "4"}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"min_new_tokens": 33}, "min_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": "a"}, "min_p"),
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
        ({"eos_token_ids": (-1,)}, "eos_token_ids"),
        ({"stop_sequences": "ab"}, "stop_sequences"),
        ({"bad_sequences": [(1,)] * 5000}, "bad_sequences"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"logprobs": "yes"}, "logprobs"),
    ],
)
def test_bad_options(options: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**options)
    assert name in caught.value.what and caught.value.expected and caught.value.found


@pytest.mark.parametrize("name", ["stop_sequences", "bad_sequences"])
def test_sequences_outside_the_vocabulary(name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name} .*expected token ids below 23, found 23"):
        generate([1], **{name: ((1, 23),)})


def test_end_tokens_outside_the_vocabulary() -> None:
    with pytest.raises(RequestError, match="eos_token_ids"):
        generate([1], eos_token_ids=(23,))


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(RequestError, match="unsupported option beam_width, num_beams"):
        SamplingParams.from_options(temperature=1.0, num_beams=4, beam_width=2)


def test_numpy_scalars_are_taken_for_what_they_are() -> None:
    found = SamplingParams(
        max_new_tokens=np.int32(3), temperature=np.float32(0.5), top_k=np.int64(4), seed=np.uint64(2**64 - 1),
        ignore_eos=np.bool_(True), stop_sequences=[np.array([1, 2])],
    )  # fmt: skip
    assert found == SamplingParams(
        max_new_tokens=3, temperature=0.5, top_k=4, seed=2**64 - 1, ignore_eos=True, stop_sequences=((1, 2),)
    )
    assert type(found.max_new_tokens) is int and type(found.seed) is int


def hand_written_candidates(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability by sorting everything in float64, as one would on paper."""
    ranked = sorted(range(len(logits)), key=lambda t: (-float(logits[t]), t))
    if top_k:
        worst = logits[ranked[min(top_k, len(ranked)) - 1]]
        ranked = [t for t in ranked if logits[t] >= worst]
    weights = [math.exp((float(logits[t]) - float(logits[ranked[0]])) / temperature) for t in ranked]
    total, kept, mass = math.fsum(weights), {}, 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if mass >= top_p * total and top_p < 1:
            break
        kept[token] = weight
        mass += weight
    return {token: weight / mass for token, weight in kept.items()}


@pytest.mark.parametrize("size", [5, 3000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3])
@pytest.mark.parametrize("top_k", [0, 1, 40, 2999])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_candidates_are_those_of_a_full_sort(size: int, top_p: float, top_k: int, temperature: float) -> None:
    from engines.runtime.sampler import _truncate

    logits = (np.random.default_rng(size).normal(size=size) * 2).astype(np.float32)
    ids, weights = _truncate(logits, SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p))
    wanted = hand_written_candidates(logits, temperature, top_k, top_p)
    assert set(ids.tolist()) == set(wanted)
    np.testing.assert_allclose(weights / weights.sum(), [wanted[t] for t in ids.tolist()], rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}, {"top_p": 0.9, "seed": 1}])
def test_sampling_leaves_the_logits_alone(options: dict[str, Any]) -> None:
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    before = logits.copy()
    sampler = Sampler(SamplingParams(repetition_penalty=1.3, bad_sequences=((3,),), **options), [1, 2], 50)
    for _ in range(5):
        sampler.sample(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-300, "seed": 1},
        {"temperature": 1e300, "seed": 1},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300, "temperature": 1.0, "seed": 1},
        {"presence_penalty": 1e300, "frequency_penalty": -1e300},
    ],
)
def test_extreme_options_stay_finite(options: dict[str, Any]) -> None:
    assert len(generate([1, 2], max_new_tokens=8, **options)) == 8


def test_masked_logits_are_never_drawn() -> None:
    logits = np.full(100, -np.inf, np.float32)
    logits[[7, 60]] = [0.0, -1.0]
    for options in ({"temperature": 2.0}, {"top_k": 50}, {"top_p": 0.99}, {"top_k": 50, "top_p": 0.99}):
        sampler = Sampler(SamplingParams(max_new_tokens=300, seed=3, logprobs=True, **options), [1], 100)
        drawn = [sampler.sample(logits) for _ in range(300)]
        assert {token for token, _ in drawn} == {7, 60}
        assert all(logprob is not None and math.isfinite(logprob) for _, logprob in drawn)


def test_log_probability_of_large_logits() -> None:
    assert log_probability(np.array([1e4, 1e4], np.float32), 0) == pytest.approx(-math.log(2))


def test_a_large_vocabulary_is_fast() -> None:
    """Bounds are ten times what a slow machine needs: they catch a full sort or a Python loop over V, not noise."""
    logits = (np.random.default_rng(0).normal(size=131072) * 3).astype(np.float32)
    for limit, options in ((0.005, {}), (0.05, {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 1})):
        sampler = Sampler(SamplingParams(max_new_tokens=100, **options), list(range(1000)), 131072)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            sampler.sample(logits)
            times.append(time.perf_counter() - start)
        assert min(times) < limit


@pytest.mark.parametrize("min_p", [0.0, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (20, 1.0, 0.7), (0, 0.8, 1.5), (30, 0.9, 2.0)])
def test_min_p_keeps_the_tokens_that_transformers_keeps_with_their_probabilities(
    min_p: float, top_k: int, top_p: float, temperature: float
) -> None:
    """Hugging Face's own warpers, in the order in which its generate applies them."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(3).standard_normal(64).astype(np.float32) * 2
    warpers = [theirs.TemperatureLogitsWarper(temperature)]
    warpers += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [theirs.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [theirs.MinPLogitsWarper(min_p)]
    scores = torch.from_numpy(logits)[None]
    for warper in warpers:
        scores = warper(None, scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=1)
    found = np.zeros(64)
    sampler = Sampler(params, [0], 64)
    ids, weights = sampler.candidates(logits)
    found[ids] = weights / weights.sum()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert min_p == 0 or (found > 0).sum() < 64
