"""The official client against the frontend, the real server and the example's engine."""

from __future__ import annotations

import asyncio
import json
import time

import jsonschema
import numpy as np
import openai
import pytest

from tests.openai.conftest import KEY
from tests.triton_repo.conftest import PROMPT

HELLO = [{"role": "user", "content": "hello"}]
RENDERED = "<|user|>hello\n<|assistant|>"
DIRECT = {"chat_template_kwargs": {"enable_thinking": False}}
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def said(front, prompt, count, **options):
    """What the engine makes of a text alone."""
    return front.engine.generate_text(prompt, count, ignore_eos=True, **options)


def test_a_completion_is_what_the_engine_says(client, front):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, **GREEDY)
    assert answer.choices[0].text == said(front, PROMPT, 12) and answer.choices[0].finish_reason == "length"
    prompt = len(front.engine.tokenizer.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (prompt, 12, prompt + 12)
    streamed = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(streamed)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == answer.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage and chunks[-2].choices[0].finish_reason == "length"
    assert len(chunks) > 8


def test_sixteen_tokens_where_a_completion_says_nothing_and_what_fits_in_a_chat(client, front):
    assert client.completions.create(model="tiny", prompt=PROMPT, **GREEDY).usage.completion_tokens == 16
    usage = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY).usage
    assert usage.total_tokens == front.engine.manifest.model.max_length


def test_prompts_of_every_kind_and_echo(client, front):
    ids = front.engine.tokenizer.encode(PROMPT)
    two = client.completions.create(model="tiny", prompt=[PROMPT, "x = "], max_tokens=6, echo=True, **GREEDY)
    assert [choice.text for choice in two.choices] == [PROMPT + said(front, PROMPT, 6), "x = " + said(front, "x = ", 6)]
    assert [choice.index for choice in two.choices] == [0, 1]
    for prompt in (ids, [ids, ids]):
        found = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, **GREEDY)
        assert {choice.text for choice in found.choices} == {said(front, PROMPT, 6)}


def test_a_chat_is_the_template_and_what_follows(client, front):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, **GREEDY)
    assert answer.choices[0].message.content == said(front, RENDERED, 12) and answer.choices[0].message.role == "assistant"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert client.chat.completions.create(model="tiny", messages=parts, max_tokens=12, **GREEDY).choices == answer.choices
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == answer.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_stop_words_end_the_text_before_them_and_say_so(client, front):
    whole = said(front, PROMPT, 40)
    word = whole[12:15]
    for stop in (word, [word, "never in it"]):
        choice = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, stop=stop, **GREEDY).choices[0]
        assert choice.text == whole[: whole.index(word)] and choice.finish_reason == "stop" and choice.stop_reason == word
    first = front.engine.generate([front.engine.tokenizer.encode(PROMPT)], 5, True)[0]
    body = {"ignore_eos": True, "stop_token_ids": [first[2]]}
    choice = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, extra_body=body).choices[0]
    assert choice.finish_reason == "stop" and client.completions.create is not None


def test_several_answers_are_those_of_their_seeds(client, front):
    options = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 1.2,
        "extra_body": {"ignore_eos": True, "top_k": 40},
    }
    three = [choice.text for choice in client.completions.create(n=3, seed=7, **options).choices]
    alone = [client.completions.create(seed=7 + each, **options).choices[0].text for each in range(3)]
    assert (
        three
        == alone
        == [said(front, PROMPT, 12, temperature=float(np.float32(1.2)), top_k=40, seed=7 + each) for each in range(3)]
    )
    streamed = ["", "", ""]
    for chunk in client.completions.create(n=3, seed=7, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == three and len(set(three)) == 3
    assert client.completions.create(n=1, seed=-5, **options).choices[0].text


def test_sampling_options_reach_the_engine(client, front):
    extra = {"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.25, "min_tokens": 3, "ignore_eos": True}
    given = {"temperature": 0.75, "top_p": 0.875, "presence_penalty": 0.5, "frequency_penalty": 0.25, "seed": 11}
    text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, extra_body=extra, **given).choices[0].text
    engine = {name: float(np.float32(value)) if isinstance(value, float) else value for name, value in (extra | given).items()}
    engine["min_new_tokens"] = engine.pop("min_tokens")
    engine.pop("ignore_eos")
    assert text == said(front, PROMPT, 20, **engine)
    token = front.engine.generate([front.engine.tokenizer.encode(PROMPT)], 1, True)[0][0]
    banned = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=1, logit_bias={str(token): -100}, logprobs=1, **GREEDY
    )
    assert banned.choices[0].logprobs.tokens[0] != front.engine.tokenizer.decode([token])
    # OpenAI's default is to draw: a seed, and nothing else, decides.
    drawn = {
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=seed).choices[0].text for seed in range(4)
    }
    assert len(drawn) > 1


def test_probabilities_are_the_models_own(client, front):
    prompt = front.engine.tokenizer.encode(PROMPT)
    expected = front.engine.submit(prompt, 8, ignore_eos=True, logprobs=True, top_logprobs=3).result()
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, logprobs=3, **GREEDY).choices[0].logprobs
    assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert "".join(found.tokens) == said(front, PROMPT, 8) and found.text_offset[1] == len(found.tokens[0])
    assert [len(row) for row in found.top_logprobs] == [3] * 8
    rendered = front.engine.tokenizer.encode(RENDERED)
    expected = front.engine.submit(rendered, 8, ignore_eos=True, logprobs=True, top_logprobs=2).result()
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=8, logprobs=True, top_logprobs=2, stream=stream, **GREEDY
        )
        if stream:
            entries = [e for c in answer if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        else:
            entries = answer.choices[0].logprobs.content
        assert [entry.logprob for entry in entries] == pytest.approx(expected.logprobs, abs=1e-5)
        assert b"".join(bytes(entry.bytes) for entry in entries).decode() == said(front, RENDERED, 8)
        rows = [[other.logprob for other in entry.top_logprobs] for entry in entries]
        assert np.asarray(rows) == pytest.approx(np.asarray([[n for _, n in row] for row in expected.top_logprobs]), abs=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept(client, stream):
    for seed in range(3):
        ask = {
            "model": "tiny",
            "messages": HELLO,
            "max_tokens": 400,
            "seed": seed,
            "response_format": FORMAT,
            "stream": stream,
            "extra_body": DIRECT,
        }
        answer = client.chat.completions.create(**ask)
        text = "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        jsonschema.validate(json.loads(text), SCHEMA)


def test_the_other_ways_to_hold_an_answer_to_a_form(client):
    ask = {"model": "tiny", "prompt": "is it? ", "max_tokens": 60, "seed": 1}
    for body, good in (
        ({"guided_choice": ["yes", "no"]}, ("yes", "no")),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, ("yes", "no")),
        ({"guided_regex": "[ab]{3}"}, None),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, None),
        ({"guided_grammar": 'root ::= "ab" | "ba"'}, ("ab", "ba")),
    ):
        text = client.completions.create(**ask, extra_body=body).choices[0].text
        assert text in good if good else set(text) <= {"a", "b"} and len(text) == 3
    text = client.completions.create(**ask | {"max_tokens": 400}, extra_body={"guided_json": json.dumps(SCHEMA)}).choices[0].text
    jsonschema.validate(json.loads(text), SCHEMA)
    with pytest.raises(openai.BadRequestError, match="found several"):
        client.completions.create(**ask, extra_body={"guided_regex": "a", "guided_choice": ["b"]})


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called_with_arguments_of_its_schema(client, stream):
    ask = {
        "model": "tiny",
        "messages": HELLO,
        "max_tokens": 370,
        "seed": 2,
        "tools": [TOOL],
        "stream": stream,
        "extra_body": DIRECT,
    }
    answer = client.chat.completions.create(tool_choice={"type": "function", "function": {"name": "look"}}, **ask)
    if stream:
        deltas = [c.choices[0].delta.tool_calls[0] for c in answer if c.choices[0].delta.tool_calls]
        name, arguments = deltas[0].function.name, "".join(d.function.arguments for d in deltas)
        assert deltas[0].id and all(d.index == 0 for d in deltas) and len(deltas) > 1
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments = call.function.name, call.function.arguments
        assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.content is None
    assert name == "look"
    jsonschema.validate(json.loads(arguments), SCHEMA)
    if not stream:
        other = {"type": "function", "function": {"name": "other", "parameters": SCHEMA}}
        required = client.chat.completions.create(tool_choice="required", **ask | {"tools": [TOOL, other], "max_tokens": None})
        (call,) = required.choices[0].message.tool_calls
        assert call.function.name in ("look", "other") and required.choices[0].finish_reason == "tool_calls"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_reasoning_is_told_from_the_answer_that_is_held_to_a_schema(client):
    """The example's model cannot reason; what it must say is decided by the grammar."""
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 450, "seed": 3, "response_format": FORMAT}
    body = {"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": None}
    close = client.chat.completions.create(**ask, extra_body=body)
    message = close.choices[0].message
    if close.choices[0].finish_reason == "stop":
        assert message.reasoning_content and "think" not in message.content
        jsonschema.validate(json.loads(message.content), SCHEMA)
    else:  # it never closed the tag
        assert message.content == "" and len(message.reasoning_content) > 100


def test_a_template_refuses_in_its_own_words(client):
    with pytest.raises(openai.BadRequestError, match="no such first message") as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "refuse me"}])
    assert caught.value.param == "messages"


REFUSED = [
    ({"model": "nobody"}, 404, "model"), ({"temperature": -1}, 400, "temperature"), ({"top_p": 0}, 400, "top_p"), ({"n": 0}, 400, "n"),
    ({"n": 1000}, 400, "n"), ({"max_tokens": 0}, 400, "max_tokens"), ({"max_tokens": 10**6}, 400, "max_tokens"), ({"stop": [""]}, 400, "stop"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"), ({"logit_bias": {"1": 101}}, 400, "logit_bias"), ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ({"messages": []}, 400, "messages"), ({"messages": [{"content": "x"}]}, 400, "messages"), ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "a b " * 4000}]}, 400, "prompt"), ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "obj"}}}}, 400, "response_format"),
    ({"tool_choice": "required"}, 400, "tools"), ({"tool_choice": {"function": {"name": "x"}}, "tools": [TOOL]}, 400, "tool_choice"),
    ({"extra_body": {"best_of": 2}}, 400, "best_of"), ({"extra_body": {"use_beam_search": True}}, 400, "use_beam_search"),
    ({"extra_body": {"lora_name": "x"}}, 400, "lora_name"), ({"modalities": ["text", "audio"]}, 400, "modalities"), ({"functions": [{}]}, 400, "functions"),
    ({"extra_body": {"nobody_knows": 1}}, 400, "nobody_knows"), ({"extra_body": {"chat_template": "{{ 1 }}"}}, 400, "chat_template"),
    ({"extra_body": {"min_p": 2}}, 400, "min_p"), ({"extra_body": {"top_k": "x"}}, 400, "top_k"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "status", "param"), REFUSED)
def test_what_cannot_be_served_is_refused_by_name(client, change, status, param, stream):
    """Streamed or not, with the status of an error and not in the middle of a stream."""
    with pytest.raises(openai.APIStatusError) as caught:
        list(client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": stream, **change}))
    assert caught.value.status_code == status and caught.value.param == param, caught.value
    assert caught.value.type == "invalid_request_error" and "Traceback" not in str(caught.value)


def test_neutral_values_and_fields_without_effect_change_nothing(client):
    plain = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, **GREEDY).choices[0].message.content
    extra = {
        "best_of": 1,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "ignore_eos": True,
        "top_k": -1,
        "min_p": 0,
        "priority": 3,
    }
    found = client.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=5, temperature=0, user="me", store=False, metadata={}, modalities=["text"],
        parallel_tool_calls=True, service_tier="auto", presence_penalty=0, response_format={"type": "text"}, extra_body=extra,
    )  # fmt: skip
    assert found.choices[0].message.content == plain


def test_models_health_and_metrics(front, client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "ngpt-deploy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")
    with pytest.raises(openai.NotFoundError, match="Embeddings are not offered"):
        client.embeddings.create(model="tiny", input="x")
    bare = front.client(base_url=front.url.removesuffix("/v1"))
    assert bare.get("/health", cast_to=object) == {"status": "ok"}
    assert "ngpt_openai_requests_open 0.0" in bare.get("/metrics", cast_to=str)


@pytest.mark.parametrize("key", ["wrong", KEY + "x", KEY[:-1], "sk-other,sk-test-1"])
def test_a_wrong_key_opens_nothing(front, key):
    other = front.client(api_key=key)
    for ask in (other.models.list, lambda: other.completions.create(model="tiny", prompt="x")):
        with pytest.raises(openai.AuthenticationError):
            ask()


def test_a_client_that_leaves_frees_its_slot_streamed_or_not(front):
    async def leave() -> None:
        client = openai.AsyncOpenAI(base_url=front.url, api_key=KEY, max_retries=0)
        ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 480, **GREEDY}
        stream = await client.completions.create(stream=True, **ask)
        async for _ in stream:
            break
        await stream.close()
        whole = asyncio.create_task(client.completions.create(**ask))
        await asyncio.sleep(0.15)
        whole.cancel()
        await client.close()

    before = front.served.wait_for(lambda now: now["ngpt_requests_active"] == 0)["ngpt_requests_cancelled"]
    time.sleep(0.2)
    asyncio.run(leave())
    front.served.wait_for(lambda now: now["ngpt_requests_cancelled"] >= before + 2 and now["ngpt_requests_active"] == 0)


def test_more_than_the_queue_holds_is_refused_and_the_rest_is_right(front):
    """Slots and queue take 36; each of the others is told to try again, with a status that clients retry on."""

    async def many() -> list[object]:
        client = openai.AsyncOpenAI(base_url=front.url, api_key=KEY, max_retries=0, timeout=120)
        ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, **GREEDY}
        found = await asyncio.gather(*(client.completions.create(**ask) for _ in range(60)), return_exceptions=True)
        await client.close()
        return found

    found = asyncio.run(many())
    right = [answer.choices[0].text for answer in found if not isinstance(answer, Exception)]
    errors = [error for error in found if isinstance(error, Exception)]
    assert set(right) == {said(front, PROMPT, 60)} and len(right) >= 36 and errors
    assert all(error.status_code == 503 and error.response.headers["retry-after"] == "1" for error in errors)
