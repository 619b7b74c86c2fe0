"""The official client's own helpers, which read answers by its models: parsed answers, accumulated streams, tools in turns."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.openai.conftest import KEY
from tests.openai.test_endpoints import DIRECT, HELLO, SCHEMA


class Verdict(BaseModel):
    a: int
    b: Literal["x", "y"]


TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}
NAMED = {"type": "function", "function": {"name": "look"}}


def test_answers_are_parsed(client):
    ask = {"model": "tiny", "messages": HELLO, "response_format": Verdict, "max_tokens": 300, "seed": 5, "extra_body": DIRECT}
    assert isinstance(client.chat.completions.parse(**ask).choices[0].message.parsed, Verdict)
    with client.chat.completions.stream(**ask) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Verdict)
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_a_streamed_call_is_put_together(client):
    ask = {
        "model": "tiny",
        "messages": HELLO,
        "tools": [TOOL],
        "tool_choice": NAMED,
        "max_tokens": 300,
        "seed": 5,
        "extra_body": DIRECT,
    }
    with client.chat.completions.stream(**ask) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert done and json.loads(call.function.arguments) == call.function.parsed_arguments
    whole = client.chat.completions.create(**ask).choices[0].message
    assert whole.tool_calls[0].function.arguments == call.function.arguments
    # What the client got goes back as it is, with the tool's answer.
    turns = [*HELLO, whole.to_dict(), {"role": "tool", "tool_call_id": whole.tool_calls[0].id, "content": "found"}]
    assert client.chat.completions.create(model="tiny", messages=turns, max_tokens=3, tools=[TOOL]).usage.completion_tokens <= 3


@pytest.mark.parametrize("n", [1, 3])
def test_answers_have_nothing_that_the_clients_models_refuse(front, client, n):
    """Validated and not just constructed, as the client does it for speed."""
    ask = {"model": "tiny", "messages": HELLO, "max_tokens": 5, "n": n, "logprobs": True, "top_logprobs": 2}
    ChatCompletion.model_validate(client.chat.completions.create(**ask).to_dict(), strict=False)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.chat.completions.create(**ask, **usage):
        ChatCompletionChunk.model_validate(chunk.to_dict())
    completion = {"model": "tiny", "prompt": ["x", "y"], "max_tokens": 5, "n": n, "logprobs": 2}
    openai.types.Completion.model_validate(client.completions.create(**completion).to_dict())
    for chunk in client.completions.create(**completion, **usage):
        if chunk.choices and chunk.choices[0].finish_reason is None:
            chunk.choices[0].finish_reason = "stop"  # the client's model of a chunk says that there is one, OpenAI's has none
        openai.types.Completion.model_validate(chunk.to_dict())


def test_many_asynchronous_clients_get_their_own_answers(front):
    async def all_of_them():
        client = openai.AsyncOpenAI(base_url=front.url, api_key=KEY, max_retries=0, timeout=120)

        async def one(seed):
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=20, seed=seed, stream=True, extra_body={"ignore_eos": True}
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        found = await asyncio.gather(*(one(each % 6) for each in range(30)))
        await client.close()
        return found

    found = asyncio.run(all_of_them())
    assert found == found[:6] * 5 and len(set(found)) == 6
