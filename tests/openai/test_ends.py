"""What ends a text is not in it, whether special tokens are shown or not."""

from __future__ import annotations

import pytest

from tests.triton_repo.conftest import PROMPT

EOS = 2  # of the example, "</s>"


def ended(client, body, **options):
    """A text whose third token is the end."""
    first = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, temperature=0, logprobs=0)
    rest = {"extra_body": {"min_tokens": 2, **body}, "logit_bias": {str(EOS): 100}, "temperature": 0, **options}
    return first.choices[0].text, client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, **rest)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_the_end_token_is_not_in_the_text(client, shown, stream):
    text, answer = ended(client, {"skip_special_tokens": not shown}, stream=stream)
    if stream:
        chunks = list(answer)
        said, last = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0]
    else:
        said, last = answer.choices[0].text, answer.choices[0]
    assert said == text and last.finish_reason == "stop" and last.stop_reason is None


def test_an_end_that_is_a_stop_word_too_is_named(client):
    for shown in (True, False):
        text, answer = ended(client, {"skip_special_tokens": not shown}, stop=["</s>", "never"])
        assert answer.choices[0].text == text and answer.choices[0].stop_reason == "</s>"


def test_a_stop_token_is_not_in_the_text(client, front):
    ids = front.engine.generate([front.engine.tokenizer.encode(PROMPT)], 8, True)[0]
    place = next(at for at in range(2, 8) if ids[at] not in ids[:at])
    body = {"stop_token_ids": [ids[place]], "ignore_eos": True}
    choice = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, extra_body=body).choices[0]
    assert choice.text == front.engine.tokenizer.decode(ids[:place]) and choice.finish_reason == "stop"


def test_what_stop_strings_hold_back_before_a_stop_token_comes_and_the_token_itself_does_not(client, front):
    tokenizer = front.engine.tokenizer
    ids = front.engine.generate([tokenizer.encode(PROMPT)], 12, True)[0]
    place = next(at for at in range(3, 12) if ids[at] not in ids[:at] and tokenizer.decode(ids[:at])[-1].isprintable())
    text, token = tokenizer.decode(ids[:place]), tokenizer.decode([ids[place]])
    body = {"stop_token_ids": [ids[place]], "ignore_eos": True}
    for stop in (text[-1] + "never", token + "never", text[-1] + token + "never"):
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop], extra_body=body
        )
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text, "stop"), stop
