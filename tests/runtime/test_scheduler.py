"""Requests join and leave a running batch without changing each other, and always come to an end."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from engines.runtime import (
    RequestError,
    SamplingParams,
    Scheduler,
)
from tests.doubles.numpy_runner import NumpyRunner
from tests.runtime.making import greedy_reference

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [3, 2, 1], [14] * 9, [0, 22]]
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 9, "top_p": 0.95},
    "penalised": {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
}


def params(kind: str, number: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=4 + 3 * number, seed=number, **KINDS[kind])


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_does_not_depend_on_its_neighbours(kind: str, chunk: int, slots: int) -> None:
    alone = [Scheduler(NumpyRunner()).submit(p, params(kind, i)).result().tokens for i, p in enumerate(PROMPTS)]
    together = Scheduler(NumpyRunner(num_slots=slots), prefill_chunk=chunk)
    handles = [together.submit(p, params(kind, i)) for i, p in enumerate(PROMPTS)]
    assert [h.result().tokens for h in handles] == alone
    if kind == "greedy":
        assert alone == [greedy_reference(NumpyRunner(), p, 4 + 3 * i) for i, p in enumerate(PROMPTS)]


def test_greedy_is_argmax_and_ties_go_to_the_lowest_id() -> None:
    runner = NumpyRunner()
    runner.override = np.zeros(23, np.float32)
    runner.override[[7, 9]] = 5
    assert Scheduler(runner).submit([1], SamplingParams(max_new_tokens=3)).result().tokens == [7, 7, 7]


def test_requests_join_and_leave_a_running_batch() -> None:
    runner = NumpyRunner(num_slots=2)
    scheduler = Scheduler(runner)
    long = scheduler.submit([1, 2], SamplingParams(max_new_tokens=20))
    for _ in range(3):
        scheduler.step()
    assert runner.decode_batches == [1, 1, 1]
    short = scheduler.submit([3], SamplingParams(max_new_tokens=4))
    third = scheduler.submit([4], SamplingParams(max_new_tokens=2))
    scheduler.step()
    assert runner.decode_batches[-1] == 2 and not third.times.first_scheduled_ns
    assert short.result().tokens == greedy_reference(NumpyRunner(), [3], 4)
    assert not long.done
    assert third.result().tokens == greedy_reference(NumpyRunner(), [4], 2)
    assert long.result().tokens == greedy_reference(NumpyRunner(), [1, 2], 20)
    assert max(runner.decode_batches) == 2 and not runner.state


def test_many_threads_get_the_tokens_of_one() -> None:
    scheduler = Scheduler(NumpyRunner(num_slots=3))
    scheduler.start()
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        handle = scheduler.submit(PROMPTS[number], params("sampled", number))
        found[number] = [event.token for event in handle]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    scheduler.stop()
    alone = {i: Scheduler(NumpyRunner()).submit(p, params("sampled", i)).result().tokens for i, p in enumerate(PROMPTS)}
    assert found == alone


def test_slots_held_by_others_make_requests_wait_not_fail() -> None:
    runner = NumpyRunner(num_slots=2)
    runner.open()  # someone drives the runner beside the scheduler
    scheduler = Scheduler(runner)
    handles = [scheduler.submit([1], SamplingParams(max_new_tokens=3)) for _ in range(3)]
    assert [handle.result().tokens for handle in handles] == [greedy_reference(NumpyRunner(), [1], 3)] * 3


def test_iterating_twice_gives_the_same_events() -> None:
    handle = Scheduler(NumpyRunner()).submit([1], SamplingParams(max_new_tokens=5))
    assert list(handle) == list(handle)


def test_result_tells_everything() -> None:
    asked = SamplingParams(max_new_tokens=4, logprobs=True, return_context_logits=True, return_generation_logits=True)
    result = Scheduler(NumpyRunner()).submit([5, 6], asked).result()
    whole = NumpyRunner().reference([5, 6, *result.tokens])
    assert result.context_logits is not None and result.generation_logits is not None
    np.testing.assert_array_equal(result.context_logits, whole[:2])
    np.testing.assert_array_equal(result.generation_logits, whole[1:5])
    assert result.cumulative_logprob == pytest.approx(sum(result.logprobs)) and len(result.logprobs) == 4
    assert (result.prompt_tokens, result.finish_reason) == (2, "length")


@pytest.mark.parametrize("option", ["prefill_chunk", "max_queue"])
def test_sizes_of_the_scheduler_are_checked(option: str) -> None:
    with pytest.raises(RequestError, match=option):
        Scheduler(NumpyRunner(), **{option: 0})


def test_times_and_stats() -> None:
    scheduler = Scheduler(NumpyRunner(num_slots=2))
    before = time.monotonic_ns()
    handles = [scheduler.submit([1, 2, 3], SamplingParams(max_new_tokens=4)) for _ in range(3)]
    assert scheduler.stats().queued == 3
    scheduler.step()
    assert (scheduler.stats().queued, scheduler.stats().active, scheduler.stats().slots) == (1, 2, 2)
    for handle in handles:
        handle.result()
        t = handle.times
        assert before <= t.arrival_ns <= t.first_scheduled_ns <= t.first_token_ns < t.last_token_ns <= time.monotonic_ns()
    with pytest.raises(RequestError):
        scheduler.submit([], SamplingParams())
    stats = scheduler.stats()
    assert (stats.requests_total, stats.completed_total, stats.rejected_total, stats.failed_total) == (3, 3, 1, 0)
    assert (stats.prompt_tokens_total, stats.generated_tokens_total) == (9, 12)
    assert (stats.active, stats.queued, stats.free_slots) == (0, 0, 2)


def test_context_and_generation_logits() -> None:
    runner = NumpyRunner()
    wanted = SamplingParams(max_new_tokens=4, return_context_logits=True, return_generation_logits=True)
    handle = Scheduler(runner, prefill_chunk=2).submit([5, 6, 7, 8, 9], wanted)
    events = list(handle)
    whole = NumpyRunner().reference([5, 6, 7, 8, 9, *handle.tokens])
    assert handle.context_logits is not None
    np.testing.assert_array_equal(handle.context_logits, whole[:5])
    np.testing.assert_array_equal(np.stack([e.logits for e in events if e.logits is not None]), whole[4:8])
    assert [e.index for e in events] == [0, 1, 2, 3]


def test_score_generates_nothing() -> None:
    scheduler = Scheduler(NumpyRunner(max_length=6), prefill_chunk=4)
    handle = scheduler.score([1, 2, 3, 4, 5, 6])  # as long as the cache
    assert handle.result().tokens == []
    np.testing.assert_array_equal(handle.context_logits, NumpyRunner().reference([1, 2, 3, 4, 5, 6]))


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 1, "the prompt is empty: expected at least one token"),
        ([1] * 65, 1, "too long: expected at most 63 tokens, found 65"),
        ([1] * 60, 5, r"at most 64 tokens, found 60 \+ 5.*at most 4 new tokens"),
        ([1, 23], 1, "out of range: expected 0 to 22, found 23"),
        ([-1], 1, "out of range: expected 0 to 22, found -1"),
        ([1.5], 1, "not a list of token ids: expected integers"),
        ([[1, 2]], 1, "one dimension"),
        ([[1], [1, 2]], 1, "one dimension"),
        ("ab", 1, "one dimension"),
        ([True], 1, "not a list of token ids"),
    ],
)
def test_bad_prompts(prompt: object, count: int, message: str) -> None:
    scheduler = Scheduler(NumpyRunner())
    with pytest.raises(RequestError, match=message):
        scheduler.submit(prompt, SamplingParams(max_new_tokens=count))  # type: ignore[arg-type]
    assert scheduler.stats().rejected_total == 1


def test_the_longest_request_fits() -> None:
    assert len(Scheduler(NumpyRunner()).submit([1] * 60, SamplingParams(max_new_tokens=4)).result().tokens) == 4
