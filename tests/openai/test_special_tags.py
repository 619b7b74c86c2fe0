"""Reasoning between tags that are special tokens, which are in a text only where special tokens are shown."""

from __future__ import annotations

import json

import jsonschema
import openai
import pytest

from tests.openai.test_endpoints import FORMAT, HELLO, SCHEMA
from triton_repo.openai.run import Frontend, Settings
from triton_repo.openai.tags import Tags

LIKELY = {"0": 13}  # of the example, <pad>: it comes after some words


@pytest.fixture(scope="module")
def special(served, repository, tmp_path_factory):
    """A frontend whose reasoning begins with the example's <s> and ends with its <pad>."""
    file = tmp_path_factory.mktemp("special") / "t"
    file.write_text("{{ messages[0].content }}{% if enable_thinking is not defined %}<s>{% endif %}")
    settings = Settings(repository, served.url, port=0, model_name="tiny", chat_template=file, reasoning=Tags("<s>", "<pad>"))
    with Frontend(settings) as frontend:
        yield openai.OpenAI(base_url=frontend.base_url, api_key="none", max_retries=0)


def answer(client, stream, **options):
    """Reasoning, content, and why it ended."""
    found = client.chat.completions.create(model="tiny", messages=HELLO, stream=stream, **options)
    if not stream:
        message = found.choices[0].message
        return getattr(message, "reasoning_content", None) or "", message.content, found.choices[0].finish_reason
    chunks = [chunk.choices[0] for chunk in found]
    reasoning = "".join(getattr(chunk.delta, "reasoning_content", None) or "" for chunk in chunks)
    return reasoning, "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason


@pytest.mark.parametrize("stream", [False, True])
def test_the_tags_are_seen_and_not_shown(special, stream):
    both = 0
    for seed in range(4):
        reasoning, content, reason = answer(special, stream, max_tokens=60, seed=seed, logit_bias=LIKELY | {"2": -100})
        assert reason == "length" and "<s>" not in reasoning + content and "<pad>" not in reasoning
        both += bool(reasoning and content)
    assert both


@pytest.mark.parametrize("stream", [False, True])
def test_the_end_is_not_in_an_answer_with_special_tokens_shown(special, stream):
    reasoning, content, reason = answer(special, stream, max_tokens=60, seed=1, logit_bias={"2": 100})
    assert (reasoning, content, reason) == ("", "", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_what_follows_is_held_to_the_schema(special, stream):
    ended = 0
    for seed in range(4):
        reasoning, content, reason = answer(special, stream, max_tokens=300, seed=seed, response_format=FORMAT, logit_bias=LIKELY)
        assert "<pad>" not in reasoning + content
        if reason == "stop" and reasoning:
            ended += 1
            jsonschema.validate(json.loads(content), SCHEMA)
    assert ended


def test_without_reasoning_the_schema_holds_from_the_start(special):
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    _, content, reason = answer(special, False, max_tokens=300, seed=4, response_format=FORMAT, extra_body=body)
    assert reason == "stop"
    jsonschema.validate(json.loads(content), SCHEMA)
