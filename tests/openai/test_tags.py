"""Reasoning and tool calls are told apart however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_repo.openai.chat import _Choice
from triton_repo.openai.tags import Splitter, Tags, tool_call

TAGS = Tags("<think>", "</think>")


def split(text, cuts, **options):
    splitter, found = Splitter(TAGS, **options), {True: "", False: ""}
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in zip(edges, edges[1:], strict=False):
        for inside, part, _ in splitter.push(text[start:end]):
            found[inside] += part
    for inside, part in splitter.flush():
        found[inside] += part
    return found[True], found[False]


pieces = st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", "a", " b\n", "<thin"]), max_size=12).map(
    "".join
)


@given(text=pieces, cuts=st.lists(st.integers(0, 99), max_size=6), inside=st.booleans(), once=st.booleans())
def test_how_it_is_cut_makes_no_difference(text, cuts, inside, once):
    whole = split(text, [], inside=inside, once=once)
    assert split(text, cuts, inside=inside, once=once) == whole
    reasoning, content = by_hand(text, inside, once)
    assert whole == (reasoning, content)


def by_hand(text, inside, once):
    found = {True: "", False: ""}
    closed = False
    while text:
        tag = TAGS.close if inside else TAGS.open
        place = -1 if once and closed else text.find(tag)
        if place < 0:
            found[inside] += text
            break
        found[inside] += text[:place]
        text, closed, inside = text[place + len(tag) :], closed or inside, not inside
    return found[True], found[False]


def said(choice, *parts):
    deltas = [delta for part in parts for delta in choice.push(part)] + list(choice.flush())
    content = "".join(d.get("content", "") for d in deltas)
    reasoning = "".join(d.get("reasoning_content", "") for d in deltas)
    return reasoning, content, [call["function"] for d in deltas for call in d.get("tool_calls", ())]


CALLS = Tags("<tool_call>", "</tool_call>")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_tool_calls_between_tags_become_calls(size):
    text = 'think</think>ok <tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call> and <tool_call>{"name": "g"}</tool_call>.'
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    reasoning, content, calls = said(_Choice(Splitter(TAGS, inside=True, once=True), Splitter(CALLS), None), *parts)
    assert reasoning == "think" and content == "ok  and ."
    assert calls == [{"name": "f", "arguments": '{"x": "é"}'}, {"name": "g", "arguments": "{}"}]


def test_what_was_meant_as_a_call_and_is_none_is_shown():
    assert said(_Choice(None, Splitter(CALLS), None), "a<tool_call>nonsense</tool_call>b") == ("", "anonsenseb", [])
    cut = '<tool_call>{"name": "f", "arg'
    _, content, calls = said(_Choice(None, Splitter(CALLS), None), cut[:15], cut[15:])
    assert calls == [] and content.endswith('"f", "arg')


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": 5}', '"x"', "[" * 100_000])
def test_what_is_no_call(text):
    assert tool_call(text) is None


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(("kind", "text", "good", "bad"), [
    ("json_schema", '{"type": "object", "properties": {"a": {"const": "/x"}}, "required": ["a"], "additionalProperties": false}', '{"a": "/x"}', '{"b": 1}'),
    ("json", "", '{"any": [1]}', "[1]"), ("regex", r"a/b\/c\n?", "a/b/c", "a/b"), ("choice", '["a\\/", "b"]', "a/", "c"),
])  # fmt: skip
@pytest.mark.parametrize("tags", [TAGS, Tags("[[", "]].*(")])
def test_what_follows_the_reasoning_is_held_to_the_guide(kind, text, good, bad, tags, opened):
    """Through the real library, with the reasoning free, whatever is in it."""
    import llguidance

    from tests.runtime.making import byte_level
    from triton_repo.openai.guides import after_reasoning

    raw = byte_level()
    tokens = llguidance.LLTokenizer(raw.to_str(), eos_token=1)
    kind, grammar = after_reasoning((kind, text), tags, None, (opened, None))
    assert kind == "lark_grammar"

    def accepts(answer):
        matcher = llguidance.LLMatcher(tokens, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = raw.encode(answer, add_special_tokens=False).ids
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    reasoning = ("" if opened else tags.open) + 'I think {"b": 1} / "x" ' + tags.close + "\n\n"
    assert accepts(reasoning + good) and not accepts(reasoning + bad)
    assert accepts(good) != opened  # without any reasoning, where the prompt has not begun it
