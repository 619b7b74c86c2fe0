"""Probabilities of a prompt (echo with logprobs), as evaluation harnesses ask for them; and places of tokens in the text."""

from __future__ import annotations

import json

import numpy as np
import openai
import pytest

from tests.triton_repo.conftest import PROMPT

SCORED = {"model": "tiny", "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": True}


def expected(front, ids):
    """Log-probabilities of a prompt's tokens after its first, and of every row's best, from the engine's own logits."""
    logits = np.asarray(front.engine.logits([ids]), np.float64)[0]
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return [float(row[token]) for row, token in zip(logits, ids[1:], strict=False)], logits.max(-1)


@pytest.mark.parametrize("as_ids", [False, True])
def test_the_probabilities_of_a_prompt_are_the_engines(client, front, as_ids):
    text = PROMPT + "    return [x for x in argv if x]\n"
    ids = front.engine.tokenizer.encode(text)
    values, best = expected(front, ids)
    choice = client.completions.create(prompt=ids if as_ids else text, **SCORED).choices[0]
    lists = choice.logprobs
    assert lists.token_logprobs[0] is None and lists.top_logprobs[0] is None
    assert lists.token_logprobs[1:-1] == pytest.approx(values, abs=1e-4)
    assert [max(row.values()) for row in lists.top_logprobs[1:]] == pytest.approx(best, abs=1e-4)
    assert "".join(lists.tokens) == choice.text and choice.text.startswith(text)
    assert [choice.text[at : at + len(token)] for at, token in zip(lists.text_offset, lists.tokens, strict=True)] == lists.tokens


def test_several_prompts_and_no_new_token(client, front):
    answer = client.completions.create(prompt=[PROMPT, "x = 1"], **SCORED | {"max_tokens": 0})
    for choice, text in zip(answer.choices, (PROMPT, "x = 1"), strict=True):
        assert choice.text == text and choice.finish_reason == "length"
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(
            expected(front, front.engine.tokenizer.encode(text))[0], abs=1e-4
        )
    assert answer.usage.completion_tokens == 0
    assert client.completions.create(model="tiny", prompt="x = 1", echo=True, max_tokens=0).choices[0].text == "x = 1"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stream": True}, "echo"),
        ({"echo": False, "max_tokens": 0}, "max_tokens"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": "x" * 9999}, "prompt"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(client, change, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**SCORED | {"prompt": "x"} | change)
    assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
def test_places_of_tokens_that_are_parts_of_characters(client, front, stream):
    """What follows is held to a text of characters that the example's tokenizer spells byte by byte."""
    text = "aé日😀b"
    body = {"guided_choice": [text]}
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=40, logprobs=0, stream=stream, extra_body=body)
    lists = [c.choices[0].logprobs for c in answer if c.choices[0].logprobs] if stream else [answer.choices[0].logprobs]
    tokens, places = [t for each in lists for t in each.tokens], [p for each in lists for p in each.text_offset]
    assert any(token.startswith("bytes:") for token in tokens) and places == sorted(places)
    data = b"".join(
        bytes.fromhex(t.removeprefix("bytes:").replace("\\x", "")) if t.startswith("bytes:") else t.encode() for t in tokens
    )
    assert data.decode().startswith(text)
    for token, place in zip(tokens, places, strict=True):
        assert token.startswith("bytes:") or text[place : place + len(token)] == token or token == "</s>"
    assert json.dumps(places)
