"""An answer that was cut is never reported as whole: whoever ends it without having been asked is an error, UNAVAILABLE.

The model runs here with a stand-in for Triton's Python module, which keeps what is sent. scripts/soak.py does it with the real server.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from engines.runtime import CapacityError, RequestError, TextStream, TokenEvent, Tokenizer
from engines.runtime.errors import ClosedError, RunnerError
from tests.runtime.making import byte_level
from triton_repo.serving_inputs import Options

FINAL = 1


class TritonError:
    INVALID_ARG, UNAVAILABLE, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "INTERNAL"

    def __init__(self, message, code="INTERNAL"):
        self.message, self.code = message, code


class Sender:
    """Keeps responses; `gone` is what a client that has left looks like."""

    def __init__(self):
        self.sent, self.gone = [], False

    def send(self, response=None, flags=0):
        self.sent.append((response, flags))

    def is_cancelled(self):
        return self.gone


@pytest.fixture
def template(monkeypatch):
    """A module of the templates, by name, over the stand-in."""
    stand_in = SimpleNamespace(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        TritonError=TritonError,
        Tensor=lambda name, array: (name, array),
        InferenceResponse=lambda output_tensors, error=None: SimpleNamespace(tensors=dict(output_tensors), error=error),
        Logger=SimpleNamespace(log_error=lambda text: None),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    for name in [name for name in sys.modules if name.startswith("triton_repo.templates.")]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: importlib.import_module(f"triton_repo.templates.{name}")


class Handle:
    """What the scheduler answers with: events, then how it ended."""

    times = context_logits = None

    def __init__(self, events, reason, error=None):
        self.events, self.finish_reason, self.error, self.cancelled = events, reason, error, []

    def cancel(self, reason="cancelled"):
        self.cancelled.append(reason)

    def __iter__(self):
        yield from self.events
        if self.error is not None:
            raise self.error


TOKENIZER = Tokenizer(byte_level())
WORDS = TOKENIZER.encode("def f(x): end", add_special_tokens=False)
SAID = [TokenEvent(token, index) for index, token in enumerate(WORDS)]
DONE = [*SAID[:-1], TokenEvent(WORDS[-1], len(WORDS) - 1, finish_reason="length")]


def answered(template, handle, *, stop=(), given_up=False, streaming=False):
    """What a client gets for these events: the text, or the error."""
    module, sender = template("engine.model"), Sender()
    model = module.TritonPythonModel()
    shared = template("shared.python_backend")
    model.watcher, model.in_flight = SimpleNamespace(watch=lambda *_: 1, forget=lambda _: None), shared.InFlight()
    model.metrics = SimpleNamespace(first_token=lambda _: None)
    running = module.Request(sender, {}, set())
    model.in_flight.add("", running)
    options = Options({}, {"stream": streaming})
    answer = module.Answer(sender, options, [1], stream=TextStream(TOKENIZER, stop))

    def submit(_):
        running.work_on(handle)
        if given_up:
            running.give_up()
        return answer, handle

    model._submit = submit
    model._serve(running, "")
    assert [flags for _, flags in sender.sent] == [0] * (len(sender.sent) - 1) + [FINAL]
    assert model.in_flight._by_id == {}
    last = sender.sent[-1][0]
    if last is not None and last.error:
        return last.error
    return b"".join(response.tensors["text_output"].item() for response, _ in sender.sent if response).decode()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_whole_answer_is_a_whole_answer(template, streaming):
    assert answered(template, Handle(DONE, "length"), streaming=streaming) == "def f(x): end"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kept", [0, 1, len(SAID)])
def test_an_engine_that_stops_by_itself_is_an_error(template, kept, streaming):
    cut = answered(template, Handle(SAID[:kept], "cancelled"), streaming=streaming)
    assert cut.code == "UNAVAILABLE" and "stopped before the answer was complete" in cut.message


@pytest.mark.parametrize(
    ("error", "code"),
    [(ClosedError("gone"), "UNAVAILABLE"), (CapacityError("full"), "UNAVAILABLE"), (RequestError("bad"), "INVALID_ARG"),
     (RunnerError("/a/path broke"), "INTERNAL"), (OSError(2, "no", "/a/path"), "INTERNAL")],
)  # fmt: skip
def test_an_engine_that_fails_is_an_error_that_names_no_files(template, error, code):
    failure = answered(template, Handle(SAID[:2], "error", error))
    assert failure.code == code and "/a/path" not in failure.message


def test_what_the_client_or_a_stop_word_ended_is_no_error(template):
    assert answered(template, Handle(SAID[:2], "cancelled"), given_up=True).startswith("def")
    handle = Handle([*SAID, SAID[0]], "cancelled")  # the engine may be stopped once the text has ended
    assert answered(template, handle, stop=["end"]) == "def f(x): " and handle.cancelled[0] == "stop"


def test_a_stream_that_stops_at_its_first_token_has_an_event(template):
    module, sender = template("engine.model"), Sender()
    first = TOKENIZER.decode(WORDS[:1])
    stream = TextStream(TOKENIZER, [first])
    answer = module.Answer(sender, Options({}, {"stream": True, "return_finish_reason": True}), [1], stream=stream)
    answer.take(SAID[0])
    answer.finish("stop", None, None)
    ((response, flags),) = sender.sent
    assert flags == FINAL and response.tensors["text_output"].item() == b""
    assert response.tensors["finish_reason"].item() == b"stop" and response.tensors["stop_reason"].item().decode() == first


def test_a_request_that_was_given_up_before_it_was_submitted_is_cancelled(template):
    module, handle = template("engine.model"), Handle([], "cancelled")
    running = module.Request(Sender(), {}, set())
    running.give_up()
    running.work_on(handle)
    assert handle.cancelled == ["cancelled"]


@pytest.mark.parametrize("package", [True, False])
@pytest.mark.parametrize("asked", [True, False, None])
def test_the_bos_is_added_as_the_request_says_or_else_as_the_package_does(template, package, asked):
    """With a tokenizer that has one; the example's has none."""
    module, read = template("engine.model"), []
    model = module.TritonPythonModel()
    model.tokenizer, model.special_tokens, model.exclude_input = TOKENIZER, package, False
    model.model = SimpleNamespace(vocab_size=1000, max_length=100, eos_token_ids=())
    submit = lambda prompt, **sampling: read.append(prompt) or Handle([], "length")  # noqa: E731
    model.engine = SimpleNamespace(manifest=SimpleNamespace(generation={}), submit=submit)
    inputs = {"text_input": np.asarray([[b"def f"]], object)} | (
        {} if asked is None else {"add_special_tokens": np.asarray([[asked]])}
    )
    model._submit(module.Request(Sender(), inputs, {"text_output"}))
    wanted = package if asked is None else asked
    plain = TOKENIZER.encode("def f", add_special_tokens=False)
    assert read == [[0, *plain] if wanted else plain] and TOKENIZER.encode("def f")[0] == 0
