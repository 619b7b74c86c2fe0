"""However a request ends (cancelled, failed, stopped), nobody hangs, no slot is lost, no neighbour is hurt."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from engines.runtime import (
    Cancelled,
    CapacityError,
    ClosedError,
    RequestError,
    RunnerError,
    SamplingParams,
    Scheduler,
    TokenEvent,
)
from tests.doubles.numpy_runner import NumpyRunner
from tests.runtime.making import greedy_reference

PROMPTS = [[1, 2, 3], [4], [5, 6, 7], [8] * 9]


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
    assert waiting.result().tokens == greedy_reference(NumpyRunner(), [2], 3)
    running.cancel()  # late and repeated: harmless
    assert scheduler.stats().cancelled_total == 1


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
        next(iter(request))
        request.cancel()
        with pytest.raises(Cancelled):
            request.result(timeout=10)
        assert scheduler.submit([3], SamplingParams(max_new_tokens=4)).result(timeout=10).tokens == greedy_reference(
            NumpyRunner(), [3], 4
        )
    finally:
        scheduler.stop()


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
        assert handle.finish_reason == "error" and len(handle.tokens) == (method == "decode")
    assert len({id(handle.error) for handle in handles}) == 4  # threads that raise one error would mix their traces
    assert not runner.state and scheduler.stats().failed_total == 4
    runner.fail.clear()
    assert scheduler.submit([1], SamplingParams(max_new_tokens=5)).result(timeout=10).tokens == greedy_reference(
        NumpyRunner(), [1], 5
    )
    scheduler.stop()


def test_an_error_of_our_own_kind_is_not_shared_either() -> None:
    runner = NumpyRunner()
    runner.fail["decode"] = RunnerError("lost", found="nothing")
    scheduler = Scheduler(runner)
    handles = [scheduler.submit([1]) for _ in range(3)]
    for handle in handles:
        with pytest.raises(RunnerError, match="lost: found nothing"):
            handle.result()
    assert len({id(handle.error) for handle in handles}) == 3


def test_a_failing_close_does_not_lose_the_tokens() -> None:
    runner = NumpyRunner()
    runner.fail["close"] = OSError("late")
    handle = Scheduler(runner).submit([1], SamplingParams(max_new_tokens=5))
    assert handle.result().tokens == greedy_reference(NumpyRunner(), [1], 5)


def test_a_runner_without_any_slot_fails_the_request() -> None:
    runner = NumpyRunner()
    runner.fail["open"] = CapacityError("slots", found="none")
    with pytest.raises(CapacityError, match="slots"):
        Scheduler(runner).submit([1], SamplingParams()).result()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_the_request(bad: float) -> None:
    runner = NumpyRunner()
    runner.override = np.full(23, bad, np.float32)
    with pytest.raises(RunnerError, match="NaN or Inf"):
        Scheduler(runner).submit([1], SamplingParams()).result()


def test_logits_of_a_wrong_shape_fail_the_request() -> None:
    runner = NumpyRunner()
    runner.override = np.zeros(22, np.float32)
    with pytest.raises(RunnerError, match=r"expected \(23,\), found \(22,\)"):
        Scheduler(runner).submit([1], SamplingParams()).result()


@pytest.mark.parametrize("threaded", [False, True])
def test_stop_cancels_what_is_left_and_refuses_more(threaded: bool) -> None:
    runner = NumpyRunner(num_slots=1, max_length=10**6)
    scheduler = Scheduler(runner)
    if threaded:
        scheduler.start()
    handles = [scheduler.submit([1], SamplingParams(max_new_tokens=900_000)) for _ in range(2)]
    next(iter(handles[0]))
    scheduler.stop()
    assert not scheduler.running and not runner.state
    for handle in handles:
        with pytest.raises(Cancelled):
            handle.result(timeout=10)
    with pytest.raises(ClosedError, match="stopped"):
        scheduler.submit([1], SamplingParams())
    with pytest.raises(ClosedError, match="stopped"):
        scheduler.start()
    scheduler.stop()


@pytest.mark.parametrize("threaded", [False, True])
def test_stop_can_let_requests_finish(threaded: bool) -> None:
    scheduler = Scheduler(NumpyRunner(num_slots=1))
    if threaded:
        scheduler.start()
    handles = [scheduler.submit([1], SamplingParams(max_new_tokens=9)) for _ in range(3)]
    scheduler.stop(drain=True)
    assert [handle.result(timeout=10).tokens for handle in handles] == [greedy_reference(NumpyRunner(), [1], 9)] * 3


def test_a_defect_in_the_thread_fails_everyone_and_hangs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(NumpyRunner(num_slots=1))
    monkeypatch.setattr(scheduler, "_prefill", lambda: 1 / 0)
    handles = [scheduler.submit([1], SamplingParams()) for _ in range(3)]
    scheduler.start()
    for handle in handles:
        with pytest.raises(RunnerError, match="ZeroDivisionError"):
            handle.result(timeout=10)
    with pytest.raises(ClosedError):
        scheduler.submit([1])


def test_one_bad_sequence_does_not_hurt_its_neighbours() -> None:
    """A request that can no longer choose a token fails alone."""
    scheduler = Scheduler(NumpyRunner())
    good = scheduler.submit([1, 2], SamplingParams(max_new_tokens=12))
    bad = scheduler.submit([3], SamplingParams(bad_sequences=tuple((t,) for t in range(23))))
    assert good.result().tokens == greedy_reference(NumpyRunner(), [1, 2], 12)
    with pytest.raises(RequestError, match="every token is forbidden"):
        bad.result()


def test_a_prompt_that_cannot_be_read_does_not_hurt_its_neighbours() -> None:
    runner = NumpyRunner()
    scheduler = Scheduler(runner)
    good = scheduler.submit([1, 2], SamplingParams(max_new_tokens=12))
    scheduler.step()
    runner.fail["prefill"] = OSError("odd prompt")
    with pytest.raises(RunnerError, match="odd prompt"):
        scheduler.submit([3]).result()
    assert good.result().tokens == greedy_reference(NumpyRunner(), [1, 2], 12)


def test_cancel_for_a_stop_string_counts_as_completed() -> None:
    scheduler = Scheduler(NumpyRunner())
    handle = scheduler.submit([1], SamplingParams(max_new_tokens=30))
    tokens = [event.token for event, _ in zip(handle, range(4), strict=False)]
    handle.cancel("stop")
    result = handle.result()
    assert result.finish_reason == "stop" and result.tokens[:4] == tokens
    assert (scheduler.stats().completed_total, scheduler.stats().cancelled_total) == (1, 0)


def test_callbacks_see_every_event() -> None:
    scheduler = Scheduler(NumpyRunner(num_slots=1))
    seen: list[TokenEvent] = []
    handle = scheduler.submit([1], SamplingParams(max_new_tokens=5), on_event=seen.append)
    handle.result()
    assert seen == list(handle) and [e.finish_reason for e in seen] == [None] * 4 + ["length"]


def test_a_failing_callback_fails_its_request_alone() -> None:
    def fail(event: TokenEvent) -> None:
        raise OSError("client went away")

    runner = NumpyRunner()
    scheduler = Scheduler(runner)
    bad = scheduler.submit([1], SamplingParams(max_new_tokens=5), on_event=fail)
    good = scheduler.submit([1, 2], SamplingParams(max_new_tokens=5))
    with pytest.raises(RunnerError, match="client went away"):
        bad.result()
    assert good.result().tokens == greedy_reference(NumpyRunner(), [1, 2], 5)
    assert not runner.state


@pytest.mark.parametrize("threaded", [False, True])
def test_a_callback_may_cancel_or_stop(threaded: bool) -> None:
    runner = NumpyRunner()
    scheduler = Scheduler(runner)

    def cancel(event: TokenEvent) -> None:
        if event.index == 3:
            first.cancel()

    def stop(event: TokenEvent) -> None:
        if event.index == 9:
            scheduler.stop()

    first = scheduler.submit([1], SamplingParams(max_new_tokens=20), on_event=cancel)
    second = scheduler.submit([2], SamplingParams(max_new_tokens=20), on_event=stop)
    third = scheduler.submit([3], SamplingParams(max_new_tokens=20))
    if threaded:
        scheduler.start()
    assert all(handle.wait(10) for handle in (first, second, third))
    scheduler.stop()
    assert [h.finish_reason for h in (first, second, third)] == ["cancelled"] * 3
    assert (len(first.tokens), len(second.tokens)) == (4, 10)
    # What the third would have got in the step that was stopped is neither delivered nor counted.
    assert scheduler.stats().generated_tokens_total == sum(len(h.tokens) for h in (first, second, third))
    assert not runner.state and scheduler.stats().cancelled_total == 3


def test_threads_that_come_and_go_leave_no_slot_behind() -> None:
    runner = NumpyRunner(num_slots=2)
    scheduler = Scheduler(runner)
    scheduler.start()

    def ask(number: int) -> None:
        handle = scheduler.submit(PROMPTS[number % len(PROMPTS)], SamplingParams(max_new_tokens=20))
        if number % 3 == 0:
            handle.cancel()
        elif number % 3 == 1:
            next(iter(handle))
            handle.cancel()
        assert handle.wait(20)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    stats = scheduler.stats()
    scheduler.stop()
    assert not any(thread.is_alive() for thread in threads)
    assert not runner.state and stats.free_slots == 2 and stats.queued == 0
    assert stats.completed_total + stats.cancelled_total == stats.requests_total == 24


def test_result_times_out() -> None:
    scheduler = Scheduler(NumpyRunner(max_length=10**6))
    handle = scheduler.submit([1], SamplingParams(max_new_tokens=900_000))
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.05)
