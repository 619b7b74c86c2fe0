"""The application by itself, with a double in the place of the server's client: what clients see when something goes wrong.

The double says pieces by the wire contract of the served model (triton_repo/interface.py). Everything that can be seen with the real
server is tested with it, in test_endpoints.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import numpy as np
import pytest

from tests.runtime.making import byte_level
from triton_repo.async_client import Refused
from triton_repo.openai import app as application
from triton_repo.openai.app import Api, Options
from triton_repo.openai.chat_template import ChatTemplate
from triton_repo.openai.models import Model


class Result:
    """One response of the served model, read as tritonclient's InferResult is."""

    def __init__(self, text="", finish=None):
        self.arrays = {"text_output": np.asarray([[text.encode()]], object)}
        if finish is not None:
            self.arrays |= {"finish_reason": np.asarray([[finish.encode()]], object), "stop_reason": np.asarray([[b""]], object)}
            self.arrays |= {"num_input_tokens": np.asarray([[3]]), "num_output_tokens": np.asarray([[5]])}

    def get_response(self):
        names = [type("Tensor", (), {"name": name})() for name in self.arrays]
        return type("Response", (), {"outputs": names})()

    def as_numpy(self, name):
        return self.arrays[name]


class Double:
    """Answers every request with the same script: results, seconds to wait, errors to raise."""

    def __init__(self, *script, is_ready=True):
        self.script, self.is_ready, self.left, self.asked = script, is_ready, 0, []

    async def stream(self, model, arrays, request_id=""):
        self.asked.append(arrays)
        whole = False
        try:
            for step in self.script:
                if isinstance(step, Result):
                    yield step
                elif isinstance(step, Exception):
                    raise step
                else:
                    await asyncio.sleep(step)
            whole = True
        finally:
            self.left += not whole

    async def ready(self, model):
        return self.is_ready

    async def close(self):
        pass


def api(double, **options):
    from engines.runtime.text import Tokenizer

    template = ChatTemplate({"default": "{{ messages[0].content }}"})
    model = Model("tiny", "ensemble", Tokenizer(byte_level()), template, 512, 332, {})
    made = Api("127.0.0.1:1", {"tiny": model}, Options(**options))
    made._client = double
    return made


async def ask(made, body, *, path="/v1/completions", key="", leave_after=None, slow=None, stuck=False, method="POST"):
    """Status, headers and body of one request by ASGI. leave_after: seconds from its way to the server until the client is
    gone. slow: seconds until the body comes. stuck: what is sent is never taken."""
    sent, answer = False, {"status": None, "headers": {}, "body": b""}
    gone = asyncio.Event()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def receive():
        nonlocal sent
        if not sent:
            sent = True
            if slow is not None:
                await asyncio.sleep(slow)
            return {"type": "http.request", "body": data, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.start":
            answer["status"] = message["status"]
            answer["headers"] = {name.decode(): value.decode() for name, value in message["headers"]}
        answer["body"] += message.get("body", b"")
        if stuck and message.get("body"):
            await asyncio.Event().wait()

    async def leave():
        if leave_after is not None:
            while not made._client.asked:
                await asyncio.sleep(0.01)
            await asyncio.sleep(leave_after)
            gone.set()

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "http_version": "1.1", "root_path": ""}
    headers = [(b"authorization", key.encode())] if key else []
    leaving = asyncio.create_task(leave())
    with contextlib.suppress(Exception):
        await made.app({**scope, "headers": headers, "asgi": {"spec_version": "2.3"}}, receive, send)
    leaving.cancel()
    return answer


def run(made, body, **options):
    return asyncio.run(ask(made, body, **options))


def counted(made, name):
    lines = made._metrics.text().decode().splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith(name) and "_created" not in line}


BODY = {"model": "tiny", "prompt": "x"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
PATHS = [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)]
WHOLE = (Result("a"), Result("b", "stop"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "script", [(9.0, *WHOLE), (Result("a"), 9.0, Result("b", "stop"))], ids=["in the queue", "in the answer"]
)
@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_client_that_leaves_ends_its_requests_wherever_they_are(path, body, script, stream):
    double = Double(*script)
    made = api(double)
    run(made, body | {"stream": stream, "n": 2}, path=path, leave_after=0.1)
    assert double.left == 2 and counted(made, "ngpt_openai_requests_open") == {"ngpt_openai_requests_open": 0.0}
    endpoint = "chat" if "chat" in path else "completions"
    assert counted(made, "ngpt_openai_requests_total") == {
        f'ngpt_openai_requests_total{{endpoint="{endpoint}",status="499"}}': 1.0
    }


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_client_that_takes_nothing_and_leaves_ends_its_request_at_once(path, body):
    async def work():
        double = Double(Result("a"), Result("b"), 9.0, Result("c", "stop"))
        await ask(api(double), body | {"stream": True}, path=path, leave_after=0.1, stuck=True)
        return double.left

    assert asyncio.run(work()) == 1


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (Refused("x", "UNAVAILABLE"), 503, "unavailable"),
        (KeyError("/secret"), 500, None),
        (Refused("the model failed"), 500, None),
    ],
)
def test_an_answer_that_is_cut_is_an_error_and_never_done(path, body, failure, status, code):
    for n in (1, 2):
        made = api(Double(Result("a"), failure))
        answer = run(made, body | {"stream": True, "n": n}, path=path)
        lines = answer["body"].decode().strip().split("\n\n")
        assert answer["status"] == 200 and "[DONE]" not in lines[-1] and "secret" not in lines[-1]
        error = json.loads(lines[-1].removeprefix("data: "))["error"]
        assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
        assert f'status="{status}"' in next(iter(counted(made, "ngpt_openai_requests_total")))
        whole = run(api(Double(Result("a"), failure)), body | {"n": n}, path=path)
        assert whole["status"] == status and json.loads(whole["body"])["error"]["code"] == code


@pytest.mark.parametrize("last", [(Result("b", "cancelled"),), ()])
def test_an_answer_that_somebody_else_has_ended_is_no_answer(last):
    for stream in (False, True):
        answer = run(api(Double(Result("a"), *last)), BODY | {"stream": stream})
        assert b"ended before it was complete" in answer["body"] and b"[DONE]" not in answer["body"]
        assert stream or (answer["status"] == 503 and answer["headers"]["retry-after"] == "1")


def test_tokens_are_counted_once_for_each_prompt():
    made = api(Double(*WHOLE))
    for stream in (False, True):
        ask = {"prompt": ["x", "y"], "n": 2, "stream": stream, "stream_options": {"include_usage": True}}
        answer = run(made, BODY | ask)["body"].decode()
        last = json.loads(answer.split("data: ")[-2] if stream else answer)
        assert last["usage"] == {"prompt_tokens": 6, "completion_tokens": 20, "total_tokens": 26}
    assert counted(made, "ngpt_openai_tokens_total") == {
        'ngpt_openai_tokens_total{kind="prompt"}': 12.0,
        'ngpt_openai_tokens_total{kind="completion"}': 40.0,
    }


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("Bearer schlüssel", 200),
        ("bearer  schlüssel ", 200),
        ("schlüssel", 401),
        ("Basic schlüssel", 401),
        ("Bearer schl", 401),
        ("", 401),
    ],
)
def test_keys_of_any_letters(sent, status):
    made = api(Double(*WHOLE), keys=["other", "schlüssel"])
    assert run(made, BODY, key=sent)["status"] == status
    assert run(made, b"", path="/v1/models", method="GET", key=sent)["status"] == status
    assert run(made, b"", path="/health", method="GET")["status"] == 200  # probes have no key


def test_health_is_the_models(monkeypatch):
    for ready in (True, False):
        answer = run(api(Double(is_ready=ready)), b"", path="/health", method="GET")
        assert answer["status"] == (200 if ready else 503)


def test_a_request_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(application, "MAX_SECONDS_OF_BODY", 0.1)
    answer = run(api(Double(*WHOLE)), BODY, slow=5)
    assert answer["status"] == 408 and b"within 0.1 seconds" in answer["body"]


@pytest.mark.parametrize(
    "body",
    [b"[" * 101 + b"]" * 101, b'{"model": "tiny", "prompt": "x", "seed": NaN}', b'{"a":' * 500 + b"1" + b"}" * 500, b"1" * 9999],
)
def test_json_that_no_library_would_like(body):
    answer = run(api(Double(*WHOLE)), body)
    assert answer["status"] == 400 and json.loads(answer["body"])["error"]["message"].startswith("The body: expected ")


def test_best_of_is_n_or_nothing():
    for options, status in (({"n": 2, "best_of": 2}, 200), ({"best_of": 1}, 200), ({"n": 1, "best_of": 2}, 400)):
        assert run(api(Double(*WHOLE)), BODY | options)["status"] == status


def test_variables_of_any_name_reach_the_template():
    double = Double(*WHOLE)
    names = {"self": 1, "named": 2, "variables": 3, "request": 4, "model": 5}
    assert run(api(double), CHAT | {"chat_template_kwargs": names}, path="/v1/chat/completions")["status"] == 200
    refused = run(api(double), CHAT | {"chat_template_kwargs": {"messages": []}}, path="/v1/chat/completions")
    assert refused["status"] == 400


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": [1.5] * 300_000}, "prompt"),
        ({"prompt": [[1.5]] * 300_000}, "prompt"),
        ({"stop": [1] * 300_000}, "stop"),
        ({"stop_token_ids": ["x"] * 300_000}, "stop_token_ids"),
        ({"logit_bias": {str(each): "x" for each in range(300_000)}}, "logit_bias"),
        ({"guided_choice": [1] * 300_000}, "guided_choice"),
    ],
)
def test_the_first_of_many_wrong_entries_is_enough(body, field):
    """With an error for each of them this took half a minute, in which no stream went on, and gigabytes."""
    start = time.monotonic()
    answer = run(api(Double(*WHOLE)), BODY | body)
    error = json.loads(answer["body"])["error"]
    assert answer["status"] == 400 and error["param"] == field and time.monotonic() - start < 3


def test_values_are_counted_and_bounded():
    answer = run(api(Double(*WHOLE)), b'{"model": "tiny", "prompt": [' + b"1," * (1 << 20) + b"1]}")
    assert answer["status"] == 413 and b"at most 1048576 values" in answer["body"]
