"""Requests join and leave a running batch without changing each other, and always come to an end."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from engines.runtime import Cancelled, CapacityError, RequestError, RunnerError, SamplingParams, Scheduler
from tests.doubles.numpy_runner import NumpyRunner

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [3, 2, 1], [14] * 9, [0, 22]]
KINDS = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 9, "top_p": 0.95},
    "penalised": {"repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
}


def params(kind: str, number: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=4 + 3 * number, seed=number, **KINDS[kind])


def greedy_reference(runner: NumpyRunner, prompt: list[int], count: int) -> list[int]:
    """Argmax over the whole sequence, anew for each token: no slots, no chunks, no batches."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(runner.reference(tokens)[-1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_does_not_depend_on_its_neighbours(kind: str, chunk: int, slots: int) -> None:
    alone = [Scheduler(NumpyRunner()).submit(p, params(kind, i)).result() for i, p in enumerate(PROMPTS)]
    together = Scheduler(NumpyRunner(num_slots=slots), prefill_chunk=chunk)
    handles = [together.submit(p, params(kind, i)) for i, p in enumerate(PROMPTS)]
    assert [h.result() for h in handles] == alone
    if kind == "greedy":
        assert alone == [greedy_reference(NumpyRunner(), p, 4 + 3 * i) for i, p in enumerate(PROMPTS)]


def test_greedy_is_argmax_and_ties_go_to_the_lowest_id() -> None:
    runner = NumpyRunner()
    runner.override = np.zeros(23, np.float32)
    runner.override[[7, 9]] = 5
    assert Scheduler(runner).submit([1], SamplingParams(max_new_tokens=3)).result() == [7, 7, 7]


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
    assert runner.decode_batches[-1] == 2 and not third.times.first_scheduled
    assert short.result() == greedy_reference(NumpyRunner(), [3], 4)
    assert not long.done
    assert third.result() == greedy_reference(NumpyRunner(), [4], 2)
    assert long.result() == greedy_reference(NumpyRunner(), [1, 2], 20)
    assert max(runner.decode_batches) == 2 and not runner.state


def test_a_long_prompt_does_not_stop_the_others() -> None:
    runner = NumpyRunner()
    scheduler = Scheduler(runner, prefill_chunk=2)
    first = scheduler.submit([1], SamplingParams(max_new_tokens=20))
    scheduler.step()
    scheduler.submit([2] * 10, SamplingParams(max_new_tokens=2))
    before = len(first.tokens)
    for _ in range(4):
        scheduler.step()
    assert len(first.tokens) == before + 4
    assert runner.prefill_chunks == [1, 2, 2, 2, 2]


def test_cancel_frees_the_slot_at_once() -> None:
    runner = NumpyRunner(num_slots=1)
    scheduler = Scheduler(runner)
    running = scheduler.submit([1], SamplingParams(max_new_tokens=30))
    waiting = scheduler.submit([2], SamplingParams(max_new_tokens=3))
    scheduler.step()
    assert list(runner.state) == [0]
    running.cancel()
    assert not runner.state and running.done
    events = list(running)
    assert events[-1].finish_reason == "cancelled" and events[-1].token == -1
    assert [e.token for e in events[:-1]] == running.tokens
    with pytest.raises(Cancelled):
        running.result()
    assert waiting.result() == greedy_reference(NumpyRunner(), [2], 3)
    running.cancel()  # late and repeated: harmless
    assert scheduler.stats().cancelled == 1


def test_cancel_of_a_waiting_request_takes_it_out_of_the_queue() -> None:
    scheduler = Scheduler(NumpyRunner(num_slots=1), max_queue=1)
    request = scheduler.submit([1], SamplingParams())
    with pytest.raises(CapacityError, match="queue is full"):
        scheduler.submit([2], SamplingParams())
    request.cancel()
    assert request.finish_reason == "cancelled" and scheduler.stats().queued == 0
    scheduler.submit([2], SamplingParams())


def test_cancel_while_the_thread_runs() -> None:
    runner = NumpyRunner(num_slots=1, max_length=100_000)
    scheduler = Scheduler(runner)
    scheduler.start()
    try:
        request = scheduler.submit([1], SamplingParams(max_new_tokens=90_000))
        next(request)
        request.cancel()
        with pytest.raises(Cancelled):
            request.result(timeout=10)
        assert scheduler.submit([3], SamplingParams(max_new_tokens=4)).result(timeout=10) == greedy_reference(
            NumpyRunner(), [3], 4
        )
    finally:
        scheduler.stop()


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
    alone = {i: Scheduler(NumpyRunner()).submit(p, params("sampled", i)).result() for i, p in enumerate(PROMPTS)}
    assert found == alone


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("method", ["open", "prefill", "decode"])
def test_a_failing_runner_fails_its_requests_and_hangs_nobody(method: str, threaded: bool) -> None:
    runner = NumpyRunner(num_slots=2)
    runner.fail[method] = OSError("device lost")
    scheduler = Scheduler(runner)
    if threaded:
        scheduler.start()
    handles = [scheduler.submit([1], SamplingParams(max_new_tokens=5)) for _ in range(4)]
    for handle in handles:
        with pytest.raises(RunnerError, match="device lost") as caught:
            handle.result(timeout=10)
        assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(RunnerError):
            list(handle)
        assert list(handle) == []
    assert not runner.state and scheduler.stats().failed == 4
    runner.fail.clear()
    assert scheduler.submit([1], SamplingParams(max_new_tokens=5)).result(timeout=10) == greedy_reference(NumpyRunner(), [1], 5)
    scheduler.stop()


def test_a_failing_close_does_not_lose_the_tokens() -> None:
    runner = NumpyRunner()
    runner.fail["close"] = OSError("late")
    handle = Scheduler(runner).submit([1], SamplingParams(max_new_tokens=5))
    assert handle.result() == greedy_reference(NumpyRunner(), [1], 5)


def test_a_runner_without_any_slot_fails_the_request() -> None:
    runner = NumpyRunner()
    runner.fail["open"] = CapacityError("slots", found="none")
    with pytest.raises(CapacityError, match="slots"):
        Scheduler(runner).submit([1], SamplingParams()).result()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_the_request(bad: float) -> None:
    runner = NumpyRunner()
    runner.override = np.full(23, bad, np.float32)
    with pytest.raises(RunnerError, match="NaN or infinity"):
        Scheduler(runner).submit([1], SamplingParams()).result()


def test_logits_of_a_wrong_shape_fail_the_request() -> None:
    runner = NumpyRunner()
    runner.override = np.zeros(22, np.float32)
    with pytest.raises(RunnerError, match=r"expected shape \(23,\), found shape \(22,\)"):
        Scheduler(runner).submit([1], SamplingParams()).result()


def test_stop_fails_what_is_left_and_start_opens_again() -> None:
    scheduler = Scheduler(NumpyRunner(num_slots=1, max_length=10**6))
    scheduler.start()
    handles = [scheduler.submit([1], SamplingParams(max_new_tokens=900_000)) for _ in range(2)]
    next(handles[0])
    scheduler.stop()
    for handle in handles:
        with pytest.raises(CapacityError, match="stopped"):
            handle.result(timeout=10)
    with pytest.raises(CapacityError, match="stopped"):
        scheduler.submit([1], SamplingParams())
    scheduler.start()
    assert len(scheduler.submit([1], SamplingParams(max_new_tokens=2)).result(timeout=10)) == 2
    scheduler.stop()


def test_result_times_out() -> None:
    scheduler = Scheduler(NumpyRunner(max_length=10**6))
    handle = scheduler.submit([1], SamplingParams(max_new_tokens=900_000))
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.05)


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
        assert before <= t.arrival <= t.first_scheduled <= t.first_token < t.last_token <= time.monotonic_ns()
    with pytest.raises(RequestError):
        scheduler.submit([], SamplingParams())
    stats = scheduler.stats()
    assert (stats.submitted, stats.completed, stats.rejected, stats.failed) == (3, 3, 1, 0)
    assert (stats.prompt_tokens, stats.generated_tokens) == (9, 12)
    assert stats.decode_rows == 9 and stats.active == stats.queued == 0


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
    assert handle.result() == []
    np.testing.assert_array_equal(handle.context_logits, NumpyRunner().reference([1, 2, 3, 4, 5, 6]))


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 1, r"prompt length: expected 1\.\.64 tokens, found 0"),
        ([1] * 65, 1, r"prompt length: expected 1\.\.64 tokens, found 65"),
        ([1] * 60, 5, r"at most 64 tokens together, found 60 \+ 5"),
        ([1, 23], 1, r"prompt\[1\]: expected a token id in 0\.\.22, found 23"),
        ([-1], 1, r"prompt\[0\]: expected a token id in 0\.\.22, found -1"),
        ([1.5], 1, "integer token ids"),
        ([[1, 2]], 1, "flat list"),
        ([[1], [1, 2]], 1, "flat list"),
        ("ab", 1, "integer token ids"),
        ([True], 1, "integer token ids"),
    ],
)
def test_bad_prompts(prompt: object, count: int, message: str) -> None:
    scheduler = Scheduler(NumpyRunner())
    with pytest.raises(RequestError, match=message):
        scheduler.submit(prompt, SamplingParams(max_new_tokens=count))  # type: ignore[arg-type]
    assert scheduler.stats().rejected == 1


def test_the_longest_request_fits() -> None:
    assert len(Scheduler(NumpyRunner()).submit([1] * 60, SamplingParams(max_new_tokens=4)).result()) == 4
