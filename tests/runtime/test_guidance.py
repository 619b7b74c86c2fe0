"""Guided answers: whatever the logits are, the text is what the guide says."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from engines.runtime import CapacityError, Guide, MissingRuntimeError, RequestError, SamplingParams, Scheduler, load_engine
from engines.runtime import Tokenizer as BoundedTokenizer
from engines.runtime.guidance import _LIMITS, GuideCompiler
from engines.runtime.guide import MAX_GUIDE_BYTES, MAX_MERGED
from engines.runtime.sampler import Sampler
from tests.doubles.numpy_runner import NumpyRunner
from tests.runtime.making import byte_level, sentencepiece_like

RAW = {"bytes": byte_level(), "pieces": sentencepiece_like()}
SIZES = {kind: raw.get_vocab_size() + 37 for kind, raw in RAW.items()}  # a model's vocabulary is often padded
COMPILERS = {kind: GuideCompiler(raw, SIZES[kind]) for kind, raw in RAW.items()}
ENDS = {"bytes": (1,), "pieces": (2, 1)}
some = settings(deadline=None, max_examples=25)
kinds = pytest.mark.parametrize("kind", RAW)
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "é": {"type": "boolean"}},
     "required": ["a", "é"], "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", None, 1.5, "😀"]}, "minItems": 1, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"anyOf": [{"const": "日本"}, {"type": "null"}]},
]  # fmt: skip


def answer(kind: str, guide: Guide, seed: int, *, count: int = 300, **options: Any) -> tuple[list[int], str, str]:
    """Tokens, text without special tokens, and finish reason, for logits that are noise."""
    params = SamplingParams(
        **{"max_new_tokens": count, "temperature": 1.0, "seed": seed, "eos_token_ids": ENDS[kind], "guide": guide, **options}
    )
    sampler = Sampler(params, [], SIZES[kind], COMPILERS[kind].compile(guide, params.eos_token_ids))
    noise = np.random.default_rng(seed)
    while True:
        sampler.sample(noise.normal(size=SIZES[kind]).astype(np.float32) * 8)
        if (reason := sampler.finish_reason()) is not None:
            text = BoundedTokenizer(RAW[kind]).decode(sampler.output)
            return sampler.output, text, reason


@kinds
@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
@some
@given(seed=st.integers(0, 2**32))
def test_json_of_a_schema_parses_and_validates(kind: str, schema: dict[str, Any], seed: int) -> None:
    for options in ({}, {"temperature": 0}, {"ignore_eos": True}, {"top_k": 3}, {"top_p": 0.5}, {"eos_token_ids": ()}):
        tokens, text, reason = answer(kind, Guide("json_schema", json.dumps(schema)), seed, count=2000, **options)
        assert reason in ("eos", "stop"), text
        jsonschema.validate(json.loads(text), schema)
        assert max(tokens) < RAW[kind].get_vocab_size()


@kinds
@pytest.mark.parametrize("pattern", ["[a-f]{3,9}", "(ab|é|日本|😀){1,4}", r"[0-9]{1,3}(\.[0-9])?", ".{1,6}", "x😀?"])
@some
@given(seed=st.integers(0, 2**32))
def test_a_regular_expression_matches_the_whole_text(kind: str, pattern: str, seed: int) -> None:
    tokens, text, reason = answer(kind, Guide("regex", pattern), seed)
    assert reason in ("eos", "stop")
    # The decoder of this kind drops a space at the start of a text, where there is no prompt.
    assert any(re.fullmatch(pattern, space + text) for space in ("", " " if kind == "pieces" else ""))
    assert (tokens[-1] in ENDS[kind]) == (reason == "eos") and not set(tokens[:-1]) & set(ENDS[kind])


@kinds
@pytest.mark.parametrize(
    ("guide", "wanted"),
    [
        (Guide("choice", '["ab", "b\\n\\"q\\" | x", "日😀"]'), r'ab|b\n"q" \| x|日😀'),
        (Guide("ebnf_grammar", 'root ::= "a" [0-9] [0-9] ("b" | "c")?'), r"a\d\d[bc]?"),
        (Guide("lark_grammar", 'start: "a" /[0-9]/ word?\nword: "b" | "c"'), r"a\d[bc]?"),
        (Guide("ebnf_grammar", 'start: "a" /[0-9]/'), r"a\d"),
    ],
)  # fmt: skip
def test_choices_and_grammars(kind: str, guide: Guide, wanted: str) -> None:
    seen = {answer(kind, guide, seed)[1] for seed in range(60)}
    assert all(re.fullmatch(wanted, text) for text in seen) and len(seen) > 2


@kinds
def test_any_json_object(kind: str) -> None:
    ended = [
        text for seed in range(12) for _, text, reason in [answer(kind, Guide("json", "ignored"), seed)] if reason != "length"
    ]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)


@kinds
def test_white_space_in_json_has_a_limit(kind: str) -> None:
    """A model that prefers spaces would never come to an end."""
    raw, matcher = RAW[kind], COMPILERS[kind].compile(Guide("json"))
    space = raw.token_to_id("<0x0A>" if kind == "pieces" else "Ċ")
    opening = raw.encode("{", add_special_tokens=False).ids[-1]
    assert not matcher.advance(opening)
    count = 0
    while matcher.allowed()[space] and count < 200:
        matcher.advance(space)
        count += 1
    assert count == 24 and matcher.allowed().any()


def sampler_of(pattern: str, **options: Any) -> Sampler:
    guide = Guide("regex", pattern)
    params = SamplingParams(**{"max_new_tokens": 9, "eos_token_ids": (1,), "guide": guide, **options})
    return Sampler(params, [], SIZES["bytes"], COMPILERS["bytes"].compile(guide, params.eos_token_ids))


def liking(**scores: float) -> np.ndarray:
    row = np.zeros(SIZES["bytes"], np.float32)
    for name, score in scores.items():
        row[1 if name == "end" else RAW["bytes"].token_to_id(name)] = score
    return row


def test_an_end_token_comes_only_where_the_guide_may_end() -> None:
    sampler, row = sampler_of("ab?c?"), liking(end=9.0)
    a, end = RAW["bytes"].token_to_id("a"), 1
    assert sampler.sample(row)[0] == a and sampler.finish_reason() is None
    assert sampler.sample(row)[0] == end and sampler.finish_reason() == "eos"


def test_a_complete_answer_ends_at_once() -> None:
    sampler = sampler_of("ab")
    assert [sampler.sample(liking(end=9.0))[0] for _ in "ab"] == [RAW["bytes"].token_to_id(c) for c in "ab"]
    assert sampler.finish_reason() == "stop" and sampler.stop_match() == ()


def test_a_complete_answer_ends_before_the_fewest_tokens_and_an_incomplete_one_does_not() -> None:
    sampler = sampler_of("ab", min_new_tokens=5)
    sampler.sample(liking())
    assert sampler.finish_reason() is None
    sampler.sample(liking())
    assert sampler.finish_reason() == "stop"
    sampler = sampler_of("a+", min_new_tokens=3)
    tokens = [sampler.sample(liking(end=9.0))[0] for _ in range(4)]
    assert 1 not in tokens[:3] and tokens[3] == 1


def test_an_ignored_end_token_never_comes() -> None:
    sampler = sampler_of("a+", ignore_eos=True)
    assert 1 not in [sampler.sample(liking(end=9.0))[0] for _ in range(9)]
    assert sampler.finish_reason() == "length"


def test_an_end_token_that_is_a_letter_ends_where_the_guide_may_end() -> None:
    b = RAW["bytes"].token_to_id("b")
    guide = Guide("regex", "ab*c?")
    params = SamplingParams(eos_token_ids=(b,), guide=guide)
    sampler = Sampler(params, [], SIZES["bytes"], COMPILERS["bytes"].compile(guide, (b,)))
    assert sampler.sample(liking(b=9.0))[0] != b  # the guide begins with a
    assert sampler.sample(liking(b=9.0))[0] == b and sampler.finish_reason() == "eos"


def test_an_answer_that_only_an_end_token_could_follow_is_complete() -> None:
    b = RAW["bytes"].token_to_id("b")
    guide = Guide("regex", "ab*")
    sampler = Sampler(
        SamplingParams(eos_token_ids=(b,), guide=guide), [], SIZES["bytes"], COMPILERS["bytes"].compile(guide, (b,))
    )
    sampler.sample(liking())
    assert sampler.finish_reason() == "stop"


def test_bad_words_and_biases_act_inside_the_guide() -> None:
    b, c = (RAW["bytes"].token_to_id(name) for name in "bc")
    assert sampler_of("b|c", bad_sequences=((b,),)).sample(liking(b=9.0))[0] == c
    assert sampler_of("b|c", logit_bias={c: 50, 70: 500}).sample(liking(b=9.0))[0] == c
    with pytest.raises(RequestError, match="every token is forbidden.*change the guide"):
        sampler_of("b|c", bad_sequences=((b,), (c,))).sample(liking())


def test_penalties_do_not_leave_the_guide() -> None:
    sampler = sampler_of("[bc]{4}", frequency_penalty=1e38, repetition_penalty=1e30)
    while sampler.finish_reason() is None if sampler.output else True:
        sampler.sample(liking(b=9.0))
    assert re.fullmatch("[bc]{4}", RAW["bytes"].decode(sampler.output))


# What cannot be followed.


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("yaml", "a", "guide: expected a kind out of json,"),
        ("regex", "", "guide: expected a text for regex"),
        ("regex", "\ud800", "guide: expected valid UTF-8"),
        ("regex", "x" * (MAX_GUIDE_BYTES + 1), f"guide: expected at most {MAX_GUIDE_BYTES} bytes"),
        ("json_schema", "{", "guide: expected JSON for json_schema"),
        ("json_schema", "[" * 60000, "guide: expected JSON for json_schema"),
        ("json_schema", "[1]", "guide: expected a JSON schema: an object"),
        ("json_schema", '{"type": "string"}, "x": 1', "guide: expected JSON for json_schema"),
        ("choice", "{}", "guide: expected a JSON list of texts"),
        ("choice", '["a", ""]', "guide: expected a JSON list of texts"),
        ("choice", '["\\ud800"]', "guide: expected JSON for choice"),
        ("lark_grammar", "start: A\nA: " + " & ".join(["/a/"] * 20), 'guide: expected at most 8 signs "&"'),
    ],
)  # fmt: skip
def test_guides_that_are_none(kind: str, text: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        Guide(kind, text)
    assert str(error.value).startswith(message) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", r"\bfoo", "not supported"),
        ("json_schema", '{"type": "nothing"}', "Invalid type"),
        ("json_schema", "false", "Unsatisfiable"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "retrieving"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "Unimplemented"),
        ("lark_grammar", "start: foo", "unknown name"),
        ("lark_grammar", '{"grammars":[{"lark_grammar":"start: /a/"}]}', "llguidance takes"),
        ("lark_grammar", "start: " + " | ".join(f'"a{i}"' for i in range(5000)), "items"),
        ("ebnf_grammar", "root ::= (", "Expected"),
        ("ebnf_grammar", "root ::= " + "(" * 30000, "llguidance takes"),
        ("lark_grammar", "start: " + "(" * 20000 + '"a"' + ")" * 20000, "nested"),
        ("regex", r"a[^\x00-\U0010ffff]", "none that this tokenizer can spell"),
        ("lark_grammar", 'start: ""', "none that this tokenizer can spell"),
        ("lark_grammar", 'start: "a" start', "Too many items"),
    ],
)  # fmt: skip
def test_guides_that_the_library_refuses(kind: str, text: str, message: str) -> None:
    with pytest.raises(RequestError) as error:
        matcher = COMPILERS["bytes"].compile(Guide(kind, text))
        matcher.advance(RAW["bytes"].token_to_id("a"))
    assert "guide" in str(error.value) and message in str(error.value)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value) and ".rs" not in str(error.value)


def test_a_schema_that_merges_too_many_patterns_is_refused() -> None:
    patterns = [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(40)]
    apart = {"type": "object", "properties": {f"p{i}": pattern for i, pattern in enumerate(patterns)}}
    COMPILERS["bytes"].compile(Guide("json_schema", json.dumps(apart)))
    chain = {f"d{i}": {"pattern": "a", "$ref": f"#/$defs/d{i + 1}"} for i in range(39)} | {"d39": {"pattern": "a"}}
    refers = {"allOf": [{"$ref": f"#/$defs/{i}"} for i in range(40)], "$defs": dict(enumerate(patterns))}
    for merged in ({"allOf": patterns}, {"$ref": "#/$defs/d0", "$defs": chain}, refers, {"items": {"allOf": patterns}}):
        with pytest.raises(RequestError, match=f"guide: expected at most {MAX_MERGED} patterns"):
            Guide("json_schema", json.dumps(merged))
    big = {"enum": [{} for _ in range(4000)]}
    hostile = {"$defs": {"big": big}, "x": [{"allOf": [{"$ref": "#/$defs/big"}]} for _ in range(1000)], "y": apart}
    begun = time.monotonic()
    with pytest.raises(RequestError, match="guide: .* too many schemas that are merged"):
        Guide("json_schema", json.dumps(hostile))
    assert time.monotonic() - begun < 2


def test_a_step_that_costs_too_much_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_LIMITS, "step_lexer_fuel", 1)
    matcher = COMPILERS["bytes"].compile(Guide("json"))
    matcher.advance(RAW["bytes"].token_to_id("{"))
    with pytest.raises(RequestError, match="guide: .*too many expressions"):
        matcher.allowed()


def test_a_guide_that_compiles_for_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GuideCompiler(RAW["bytes"], SIZES["bytes"])
    compiler.prepare()
    monkeypatch.setattr("engines.runtime.guidance.MAX_SECONDS", 0.05)
    monkeypatch.setattr(compiler, "_compile", lambda *_: time.sleep(0.6))
    for _ in range(4):
        with pytest.raises(RequestError, match=r"guide: .*more than 0\.05 seconds"):
            compiler.compile(Guide("json"))
    with pytest.raises(CapacityError, match="at most 4 at a time"):
        compiler.compile(Guide("json"))
    monkeypatch.undo()
    assert compiler.compile(Guide("json")).allowed().any()


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingRuntimeError, match='llguidance.*"guided"'):
        GuideCompiler(RAW["bytes"], SIZES["bytes"]).compile(Guide("json"))


def test_engines_whose_tokenizer_cannot_guide() -> None:
    with pytest.raises(RequestError, match="guide: expected an engine with a tokenizer"):
        GuideCompiler(None, 23).compile(Guide("json"))
    words = RawTokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    with pytest.raises(RequestError, match="guide: expected "):
        GuideCompiler(words, 3).compile(Guide("regex", "c"))


# Through the scheduler and the engine.


def test_a_request_that_no_token_is_left_for_fails_alone() -> None:
    scheduler = Scheduler(NumpyRunner(SIZES["bytes"]), guides=COMPILERS["bytes"])
    bad = tuple((RAW["bytes"].token_to_id(name),) for name in "bc")
    guide = Guide("regex", "[bc]d")
    failing = scheduler.submit([3], SamplingParams(guide=guide, bad_sequences=bad))
    others = [scheduler.submit([3], SamplingParams(guide=guide, seed=1, temperature=1.0)) for _ in range(2)]
    with pytest.raises(RequestError, match="every token is forbidden"):
        failing.result()
    for other in others:
        result = other.result()
        assert re.fullmatch("[bc]d", RAW["bytes"].decode(result.tokens)) and result.finish_reason == "stop"
    with pytest.raises(RequestError, match="unclosed"):
        scheduler.submit([3], SamplingParams(guide=Guide("regex", "(")))
    assert scheduler.stats().rejected_total == 1 and scheduler.stats().queued == 0


def test_an_answer_that_is_cut_says_so() -> None:
    scheduler = Scheduler(NumpyRunner(SIZES["bytes"]), guides=COMPILERS["bytes"])
    result = scheduler.submit([3], SamplingParams(max_new_tokens=2, guide=Guide("regex", "[b-d]{200}"))).result()
    assert len(result.tokens) == 2 and result.finish_reason == "length"


def test_the_example_follows_guides(tiny_engine_folder: Path) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 2]}},
              "required": ["name", "n"], "additionalProperties": False}  # fmt: skip
    guide = Guide("json_schema", json.dumps(schema))
    with load_engine(tiny_engine_folder, num_slots=2, threads=1) as engine:
        for options in ({}, {"temperature": 1.0, "seed": 3}):
            pieces = list(engine.stream_text("def f(", 300, guide=guide, **options))
            jsonschema.validate(json.loads("".join(pieces)), schema)
            assert "".join(pieces) == engine.generate_text("def f(", 300, guide=guide, **options)
        prompt = engine.tokenizer.encode("def f(")
        [tokens, _] = engine.generate([prompt, prompt[:2]], 300, guide=guide)
        assert [event.token for event in engine.stream(prompt, 300, guide=guide)] == tokens
        assert engine.submit(prompt, 300, guide=guide).result().tokens == tokens
        assert "".join(engine.stream_text("x =", 40, guide=Guide("choice", '["yes", "no"]'))) in ("yes", "no")
        assert engine.generate_text("x =", 40, guide=Guide("regex", "[0-9]+;"), stop=[";"]).isdigit()
        with pytest.raises(RequestError, match="guide"):
            engine.submit(prompt, guide="json")
