"""The engine over the double: what a user of `load_engine` relies on, and every way a folder can be wrong."""

from __future__ import annotations

import gc
import importlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.runtime import (
    ClosedError,
    Engine,
    EngineFileError,
    Manifest,
    RequestError,
    RunnerError,
    Tokenizer,
    load_engine,
)
from tests.doubles.numpy_runner import NumpyRunner
from tests.runtime.making import byte_level, manifest_dict, write_engine

V = byte_level().get_vocab_size()


def double(folder: Path, manifest: Manifest, num_slots: int, threads: int | None) -> NumpyRunner:
    """What load_engine opens for the runtime "numpy"."""
    return NumpyRunner(manifest.model.vocab_size, num_slots, manifest.model.max_length)


@pytest.fixture(autouse=True)
def _numpy_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("engines.runtime.engine")
    monkeypatch.setitem(module._RUNNERS, "numpy", double)


def make(tokenizer: bool = True, vocab_size: int = V, max_length: int = 64, **options: Any) -> Engine:
    data = manifest_dict(vocab_size, max_length)
    data["files"] = {"model.onnx": {"bytes": 1, "sha256": "0" * 64}}
    runner = NumpyRunner(vocab_size, 3, max_length)
    return Engine(runner, Manifest.from_dict(data), Tokenizer(byte_level()) if tokenizer else None, **options)


def test_logits_of_padded_rows() -> None:
    rows = [[5, 6, 7, 8], [9, 10], [11], [12, 13, 14]]
    ids, mask = np.full((4, 5), 3), np.zeros((4, 5), np.int64)
    for at, row in enumerate(rows):  # on the left in even rows, on the right in odd ones
        place = slice(5 - len(row), 5) if at % 2 == 0 else slice(0, len(row))
        ids[at, place], mask[at, place] = row, 1
    with make(prefill_chunk=2) as engine:
        out = engine.logits(ids, mask)
    assert out.shape == (4, 5, V) and out.dtype == np.float32
    for at, row in enumerate(rows):
        np.testing.assert_array_equal(out[at, mask[at] == 1], NumpyRunner(V).reference(row))
    assert not out[mask == 0].any()


def test_logits_without_a_mask_and_of_empty_rows() -> None:
    with make(max_length=4) as engine:
        ids = np.array([[1, 2, 3, 4], [4, 3, 2, 1]])
        np.testing.assert_array_equal(engine.logits(ids)[1], NumpyRunner(V, max_length=4).reference([4, 3, 2, 1]))
        out = engine.logits(ids, np.array([[0, 0, 0, 0], [1, 1, 1, 1]]))
        assert not out[0].any() and out[1].any()
        assert engine.runner.state == {}


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([1, 2], None, r"shape \[B, T\]"),
        ([[1.0]], None, "float64"),
        ([[]], None, "at least 1"),
        ([[1, V]], None, "out of range"),
        ([[-1]], None, "out of range"),
        ([[1] * 65], None, "too long"),
        ([[1, 2]], [[1]], "attention_mask"),
        ([[1, 2]], [[1, 2]], "zeros and ones"),
    ],
)
def test_bad_input_to_logits(ids: Any, mask: Any, message: str) -> None:
    with make() as engine, pytest.raises(RequestError, match=message):
        engine.logits(np.array(ids), None if mask is None else np.array(mask))


def test_generate_gives_new_tokens_in_order() -> None:
    prompts = [[5, 6], np.array([7]), (8, 9, 10), [11] * 30]
    with make() as engine:
        found = engine.generate(prompts, max_new_tokens=8, ignore_eos=True)
        assert [engine.generate([p], max_new_tokens=8, ignore_eos=True)[0] for p in prompts] == found
        assert [len(tokens) for tokens in found] == [8] * 4 and engine.generate([]) == []
        assert all(type(token) is int for token in found[0])


def test_more_prompts_than_the_queue_holds() -> None:
    with make(max_queue=2) as engine:
        found = engine.generate([[t] for t in range(5, 14)], max_new_tokens=3, ignore_eos=True)
        assert found == [engine.generate([[t]], max_new_tokens=3, ignore_eos=True)[0] for t in range(5, 14)]


def test_the_models_end_token_ends_a_request() -> None:
    with make() as engine:
        plain = engine.generate([[5, 6]], max_new_tokens=10, ignore_eos=True)[0]
        end = plain[4]
        object.__setattr__(engine.manifest.model, "eos_token_ids", (end,))
        assert engine.generate([[5, 6]], max_new_tokens=10)[0] == plain[: plain.index(end) + 1]
        assert engine.generate([[5, 6]], max_new_tokens=10, ignore_eos=True)[0] == plain
        assert engine.generate([[5, 6]], max_new_tokens=10, eos_token_ids=())[0] == plain


def test_a_bad_prompt_is_found_before_any_is_begun() -> None:
    with make() as engine:
        with pytest.raises(RequestError, match="out of range"):
            engine.generate([[5], [6], [V]])
        assert engine.scheduler.stats().requests_total == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate([[5]], beam_width=3), "unsupported option beam_width"),
        (lambda e: e.generate([[5]], max_new_tokens=0), "max_new_tokens"),
        (lambda e: e.generate([[5]], max_new_tokens=-1), "max_new_tokens"),
        (lambda e: e.generate([5, 6]), "list of integers per request"),
        (lambda e: e.stream([V]), "out of range"),
        (lambda e: e.stream_text(b"\xff"), "UTF-8"),
        (lambda e: e.stream_text("a", stop="x"), "stop"),
        (lambda e: e.generate_text("a " * 65), "too long"),
    ],
)
def test_bad_requests_are_refused_when_made(call: Any, message: str) -> None:
    with make() as engine, pytest.raises(RequestError, match=message):
        call(engine)


def test_streams() -> None:
    with make() as engine:
        plain = engine.generate([[5, 6]], max_new_tokens=10, ignore_eos=True)[0]
        events = list(engine.stream([5, 6], max_new_tokens=10, ignore_eos=True, logprobs=True))
        assert [e.token for e in events] == plain and all(e.logprob is not None for e in events)
        tokens = engine.generate([engine.tokenizer.encode("def f")], max_new_tokens=30, ignore_eos=True)[0]
        pieces = list(engine.stream_text("def f", max_new_tokens=30, ignore_eos=True))
        assert "" not in pieces and len(pieces) > 3
        assert "".join(pieces) == engine.tokenizer.decode(tokens) == engine.generate_text("def f", 30, ignore_eos=True)


def test_a_stop_string_ends_the_request_and_frees_its_slot() -> None:
    with make(max_length=10**6) as engine:
        whole = engine.generate_text("def f", 40, ignore_eos=True)
        stop = whole[5:8]
        assert engine.generate_text("def f", 900_000, ignore_eos=True, stop=[stop]) == whole[: whole.index(stop)]
        engine.generate([[5]], 3, ignore_eos=True)  # takes more than one step, so the slot is free by now
        stats = engine.scheduler.stats()
        assert stats.free_slots == 3 and stats.completed_total == 3 and stats.cancelled_total == 0
        late = engine.generate_text("def f", 40, ignore_eos=True, stop=[stop], min_new_tokens=40)
        assert late == whole


def test_leaving_a_stream_early_cancels_the_request() -> None:
    with make(max_length=10**6) as engine:
        for stream in (engine.stream([5], 900_000, ignore_eos=True), engine.stream_text("a", 900_000, ignore_eos=True)):
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        assert engine.generate([[5]], 3, ignore_eos=True)  # a step later nothing else runs
        stats = engine.scheduler.stats()
        assert stats.cancelled_total == 2 and stats.active == 0


def test_a_closed_engine_says_so() -> None:
    engine = make()
    engine.generate([[5]])
    engine.close()
    engine.close()
    for call in (lambda: engine.generate([[5]]), lambda: engine.logits(np.array([[5]])), lambda: engine.stream([5])):
        with pytest.raises(ClosedError, match="closed"):
            call()


def test_a_dropped_engine_leaves_no_thread_behind() -> None:
    engine = make()
    engine.generate([[5]])
    thread = engine.scheduler._thread
    assert thread is not None and thread.is_alive()
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_stream_keeps_its_engine() -> None:
    before = threading.active_count()
    events = list(make().stream([5], max_new_tokens=20, ignore_eos=True))
    assert events[-1].finish_reason == "length"
    gc.collect()
    assert threading.active_count() == before


def test_a_failing_runner_reaches_the_caller() -> None:
    with make() as engine:
        engine.runner.fail["decode"] = OSError("device lost")
        with pytest.raises(RunnerError, match="device lost"):
            engine.generate([[5], [6]])
        with pytest.raises(RunnerError, match="device lost"):
            list(engine.stream_text("a"))
        engine.runner.fail.clear()
        assert engine.generate([[5]], 3, ignore_eos=True) and not engine.runner.state


def test_an_engine_without_a_tokenizer_still_takes_tokens() -> None:
    with make(tokenizer=False) as engine:
        assert engine.generate([[5]], 3, ignore_eos=True)
        with pytest.raises(EngineFileError, match="tokenizer"):
            engine.generate_text("a")


# Folders.


def test_load_engine(tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "engine", byte_level(), **{"model": manifest_dict(V)["model"]})
    for path in (folder, str(folder)):
        with load_engine(path, num_slots=2) as engine:
            assert engine.runner.num_slots == 2 and engine.manifest.name == "double"
            assert engine.generate_text("def f", 5)
    with load_engine(write_engine(tmp_path / "bare")) as engine, pytest.raises(EngineFileError, match="no such file"):
        engine.tokenizer  # noqa: B018


def test_altered_files_are_found(tmp_path: Path) -> None:
    folder = write_engine(tmp_path / "engine")
    (folder / "model.onnx").write_bytes(b"not A graph")
    with pytest.raises(EngineFileError, match=r"'model.onnx': expected SHA-256"):
        load_engine(folder)
    load_engine(folder, verify_files=False).close()
    (folder / "model.onnx").write_bytes(b"shorter")
    with pytest.raises(EngineFileError, match="expected 11 bytes, found 7 bytes"):
        load_engine(folder, verify_files=False)
    (folder / "model.onnx").unlink()
    with pytest.raises(EngineFileError, match="found nothing"):
        load_engine(folder)


def test_folders_that_are_no_engines(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(EngineFileError, match="no such file"):
            load_engine(folder)


def test_the_steps_and_the_queue_are_as_large_as_load_engine_is_told(tmp_path: Path) -> None:
    with load_engine(write_engine(tmp_path / "engine"), num_slots=1, prefill_chunk=2, max_queue=1) as engine:
        assert engine.scheduler.max_queue == 1
        engine.generate([[5, 6, 7, 8, 9]], max_new_tokens=1)
        assert isinstance(engine.runner, NumpyRunner) and engine.runner.prefill_chunks == [2, 2, 1]


BAD_SIZES: list[dict[str, Any]] = [{"num_slots": 0}, {"num_slots": True}, {"num_slots": 2.0}, {"threads": 0}, {"threads": -1}]
BAD_SIZES += [{name: value} for name in ("prefill_chunk", "max_queue") for value in (0, -1, True, 2.5, None)]


@pytest.mark.parametrize("option", BAD_SIZES)
def test_bad_sizes(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(option))):
        load_engine(write_engine(tmp_path / "engine"), **option)


def test_closing_releases_the_model_after_the_last_step_and_so_does_dropping() -> None:
    engine = make()
    runner = engine.runner
    assert isinstance(runner, NumpyRunner)
    engine.submit([5, 6], 60, ignore_eos=True)
    engine.close()
    assert runner.released and not runner.state
    dropped = make()
    runner = dropped.runner
    del dropped
    gc.collect()
    assert isinstance(runner, NumpyRunner) and runner.released


def test_an_unknown_runtime_is_named(tmp_path: Path) -> None:
    target = manifest_dict()["target"] | {"runtime": "abacus"}
    with pytest.raises(EngineFileError, match="expected onnxruntime or tensorrt or tensorrt_rtx or numpy, found abacus"):
        load_engine(write_engine(tmp_path / "engine", target=target))


def test_a_missing_library_comes_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "onnxruntime", None)
    target = manifest_dict()["target"] | {"runtime": "onnxruntime"}
    with pytest.raises(Exception, match="Run: pip install onnxruntime"):
        load_engine(write_engine(tmp_path / "engine", target=target))


# The example, through ONNX Runtime.

STABLE = 0.05
"""A gap between first and second logit that int8 rounding in another batch shape cannot close."""


def test_the_example_answers_the_same_alone_and_in_a_batch(tiny_engine_folder: Path) -> None:
    texts = ["def main(", "import os\nimport ", "class Error(Exception):\n", "for i in range(", "# ", "return self."]
    with load_engine(tiny_engine_folder, num_slots=3, threads=1) as engine:
        prompts = [engine.tokenizer.encode(text) for text in texts]
        together = engine.generate(prompts, max_new_tokens=40, ignore_eos=True)
        stable = 0
        for prompt, tokens in zip(prompts, together, strict=True):
            alone = list(engine.stream(prompt, max_new_tokens=40, ignore_eos=True, return_generation_logits=True))
            for event, token in zip(alone, tokens, strict=True):
                assert event.logits is not None
                second, first = np.partition(event.logits, -2)[-2:]
                if first - second <= STABLE:
                    break
                assert event.token == token
                stable += 1
        assert stable >= 80  # of 240: enough that the loop above has seen something


def test_the_example_streams_what_it_generates(tiny_engine_folder: Path) -> None:
    with load_engine(tiny_engine_folder, num_slots=2, threads=1) as engine:
        options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.2, "seed": 7, "ignore_eos": True}
        tokens = engine.generate([engine.tokenizer.encode("# naïve 日本 😀\ndef ")], **options)[0]
        pieces = list(engine.stream_text("# naïve 日本 😀\ndef ", **options))
        assert "".join(pieces) == engine.tokenizer.decode(tokens)
