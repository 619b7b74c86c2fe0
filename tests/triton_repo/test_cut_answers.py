"""An answer that was cut is never reported as whole: whoever ends it without having been asked is an error, UNAVAILABLE.

The models run here with a stand-in for Triton's Python module, which keeps what is sent. The real server was tried by hand, with 24 and 32
requests in flight, its engine's process killed and itself told to stop: no short success in three runs, but minutes until tritonserver 2.51
had ended, and a fourth run had not ended after five.
"""

from __future__ import annotations

import importlib
import socket
import sys
import threading
from types import SimpleNamespace

import pytest

from engines.runtime import TextStream, Tokenizer
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


class Link:
    """Yields what it was given, as a link to an engine does."""

    def __init__(self, *messages):
        self.messages, self.given_up = messages, False

    def cancel(self):
        self.given_up = True

    def __iter__(self):
        for message in self.messages:
            yield message, []


TOKENIZER = Tokenizer(byte_level())
WORDS = TOKENIZER.encode("def f(x): end", add_special_tokens=False)
SAID = [{"token": token, "logprob": None, "last": False} for token in WORDS]
END = {"end": "length", "times": {}}


def answered(template, *messages, stop=(), gone=False):
    """What a client of the text model gets for these messages of the engine: the text, or the error."""
    module, sender = template("engine.text"), Sender()
    sender.gone = gone
    model = module.TritonPythonModel()
    model.link, model.address, model.in_turn = SimpleNamespace(EngineLink=lambda *_: Link(*messages)), "", True
    work = module.Work(sender, Options({}, {}), [1], {}, TextStream(TOKENIZER, stop), "")
    model._run(work)
    (response, flags), *more = sender.sent
    assert flags == FINAL and not more
    return response.error or response.tensors["text_output"].item().decode()


def test_a_whole_answer_is_a_whole_answer(template):
    assert answered(template, *SAID, END) == "def f(x): end"


@pytest.mark.parametrize("kept", [0, 1, len(SAID)])
def test_an_engine_that_stops_by_itself_is_an_error_for_text(template, kept):
    cut = answered(template, *SAID[:kept], {"end": "cancelled", "times": {}})
    assert cut.code == "UNAVAILABLE" and "stopped before the answer was complete" in cut.message


def test_an_engine_that_ends_is_an_error_for_text(template):
    cut = answered(template, *SAID[:2], template("engine.link").CUT)
    assert cut.code == "UNAVAILABLE" and "ended before the answer" in cut.message


def test_what_the_client_or_a_stop_word_ended_is_no_error(template):
    assert answered(template, *SAID[:2], {"end": "cancelled", "times": {}}, gone=True).startswith("def")
    for after in ({"end": "cancelled", "times": {}}, template("engine.link").CUT):  # the engine may end once the text has
        assert answered(template, *SAID, after, stop=["end"]) == "def f(x): "


def test_a_connection_that_closes_without_an_end_says_so(template):
    link, name = template("engine.link"), f"\0ngpt-test-{threading.get_ident()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(name)
        listener.listen()

        def serve():
            connection, _ = listener.accept()
            with connection:
                assert link.receive(connection)[0]["prompt"] == [1, 2]
                link.send(connection, SAID[0])

        thread = threading.Thread(target=serve)
        thread.start()
        found = [header for header, _ in link.EngineLink(name, [1, 2], {})]
        thread.join()
    assert [header.get("token") for header in found] == [WORDS[0], None] and found[-1] == link.CUT


@pytest.mark.parametrize(
    ("reason", "asked", "cut"), [("cancelled", False, True), ("cancelled", True, False), ("length", False, False)]
)
def test_the_tokens_model_tells_a_cut_answer_from_one_that_was_given_up(template, reason, asked, cut):
    cancelled = []
    handle = SimpleNamespace(finish_reason=reason, cancel=lambda: cancelled.append(True))
    answer = template("engine.tokens").Answer(Sender(), Options({}, {}), [1], True, handle)
    if asked:
        answer.give_up()
    error = answer.cut()
    assert (error is not None) == cut and bool(cancelled) == asked
    assert error is None or error.code == "UNAVAILABLE"
