"""What clients send becomes what templates expect."""

from __future__ import annotations

import pytest

from triton_repo.openai.chat_template import ChatTemplate
from triton_repo.openai.errors import ApiError
from triton_repo.openai.messages import for_template

QWEN = ChatTemplate(
    {
        "default": "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<tool_call>{{ c.function | tojson }}{% endfor %};{% endfor %}"
    }
)


def call(arguments):
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": "<é>"}', '{"a": "<é>"}'),
        ("", "{}"),
        ("not json", '"not json"'),
        ("[1]", '"[1]"'),
        ({"a": 1}, '{"a": 1}'),
        ("[" * 9999, None),
    ],
)
def test_arguments_of_calls_are_objects(arguments, expected):
    (message,) = for_template([{"role": "assistant", "content": None, "tool_calls": [call(arguments)]}], QWEN)
    text = QWEN.render([message])
    if expected is not None:
        assert text == f'assistant:<tool_call>{{"name": "f", "arguments": {expected}}};'


def test_null_is_what_is_not_there():
    messages = for_template([{"role": "assistant", "content": None, "tool_calls": None, "name": None}], QWEN)
    assert QWEN.render(messages) == "assistant:;"


def test_developers_are_the_system_to_a_template_that_has_not_heard_of_them():
    asked = [{"role": "developer", "content": "be"}]
    assert QWEN.render(for_template(asked, QWEN)) == "system:be;"
    newer = ChatTemplate({"default": "{{ messages[0].role }}{# developer #}"})
    assert newer.render(for_template(asked, newer)) == "developer"


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": 5},
        {"role": "user", "content": 5},
        {"role": "user", "content": [5]},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "assistant", "tool_calls": [5]},
    ],
)
def test_what_is_no_message_is_named(message):
    with pytest.raises(ApiError, match=r"^messages\[1\]\.") as caught:
        for_template([{"role": "user", "content": "x"}, message], QWEN)
    assert caught.value.param == "messages"
