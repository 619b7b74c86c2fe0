"""Answers held to a form, whatever the model would rather say: random logits through the real library, and the example's engine."""

from __future__ import annotations

import json
import re
import sys

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from engines import load_engine
from engines.runtime import Guide, MissingRuntimeError, RequestError, SamplingParams, Tokenizer
from engines.runtime.guidance import Guides
from engines.runtime.sampler import Sampler
from tests.conftest import TINY
from tests.runtime.making import byte_level, sentencepiece_like

EXAMPLE = Tokenizer(RawTokenizer.from_str((TINY / "tokenizer.json").read_text()))
TOKENIZERS = {"example": EXAMPLE, "bytes": Tokenizer(byte_level())}
GUIDES = {name: Guides(tokenizer, tokenizer.vocab_size + 7) for name, tokenizer in TOKENIZERS.items()}
EOS = 0
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "bb"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "on": {"type": "boolean"},
    },
    "required": ["kind", "count", "on"],
    "additionalProperties": False,
}


def answer(name, guide, seed, *, most=200, eos=(EOS,), greedy=False, **options):
    """What a model that has no idea answers: every step's logits are random. Returns the text, the tokens and how it ended."""
    random = np.random.default_rng(seed)
    tokenizer, vocab = TOKENIZERS[name], TOKENIZERS[name].vocab_size + 7
    params = SamplingParams(
        max_new_tokens=most, guide=guide, eos_token_ids=eos, seed=seed, temperature=0.0 if greedy else 1.0, **options
    )
    sampler = Sampler(params, [1], vocab, GUIDES[name].constraint(guide))
    while True:
        sampler.sample(random.standard_normal(vocab).astype(np.float32) * 4)
        if (reason := sampler.finish_reason()) is not None:
            break
    kept = sampler.output[:-1] if reason == "eos" else sampler.output
    return tokenizer.decode(kept), sampler.output, reason


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), greedy=st.booleans())
def test_a_schema_is_kept_whatever_the_logits(name, seed, greedy):
    text, _, reason = answer(name, Guide("json_schema", json.dumps(SCHEMA)), seed, greedy=greedy)
    if reason != "length":
        jsonschema.validate(json.loads(text), SCHEMA)
    else:  # white space may go on
        assert text.startswith("{")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("pattern", [r"[a-c]{2,5}-[0-9]{1,3}x", r"(yes|no)", r"é{1,4}!", r"[^a-z]{3}"])
def test_an_expression_matches_the_whole_answer(name, pattern):
    ended = 0
    for seed in range(20):
        text, _, reason = answer(name, Guide("regex", pattern), seed, most=80)
        ended += reason != "length"
        assert reason == "length" or re.fullmatch(pattern, text), (seed, text)
    assert ended >= 15


def test_choices_grammars_and_any_object():
    for seed in range(10):
        assert answer("example", Guide("choice", '["left", "right", "left or right"]'), seed)[0] in (
            "left",
            "right",
            "left or right",
        )
        assert re.fullmatch("(ab)+", answer("example", Guide("ebnf_grammar", 'root ::= "ab" root | "ab"'), seed, most=400)[0])
        assert re.fullmatch("[0-9]+;", answer("example", Guide("lark_grammar", 'start: /[0-9]{1,4}/ ";"'), seed)[0])
        text, _, reason = answer("example", Guide("json"), seed, most=400)
        assert reason == "length" or isinstance(json.loads(text), dict)


def test_an_answer_that_can_only_end_ends_with_or_without_a_token_for_it():
    for eos in ((EOS,), ()):
        text, tokens, reason = answer("example", Guide("choice", '["left"]'), 3, eos=eos)
        assert text == "left" and reason == "stop" and EOS not in tokens
    assert answer("example", Guide("choice", '["left"]'), 3, min_new_tokens=50)[2] == "stop"


def test_an_end_token_comes_only_where_the_answer_may_end():
    reasons = set()
    for seed in range(30):
        text, tokens, reason = answer("example", Guide("regex", "(ab)*c?"), seed, most=60)
        reasons.add(reason)
        assert EOS not in tokens[:-1] and (reason == "length" or re.fullmatch("(ab)*c?", text))
    assert "eos" in reasons and "stop" in reasons
    assert len(answer("example", Guide("regex", "(ab)*"), 1, most=60, min_new_tokens=20)[1]) >= 20


def test_special_tokens_and_ids_beyond_the_tokenizer_are_no_text():
    special = {token for token, entry in EXAMPLE.raw.get_added_tokens_decoder().items() if entry.special}
    allowed, may_end = GUIDES["example"].constraint(Guide("regex", "(.|\n)*")).allowed()
    assert may_end and allowed.sum() > 1000 and len(allowed) == EXAMPLE.vocab_size + 7
    assert not allowed[EXAMPLE.vocab_size :].any() and not any(allowed[token] for token in special)


def test_a_tokenizer_of_pieces_with_bytes_spells_what_it_has_no_piece_for():
    tokenizer = Tokenizer(sentencepiece_like())
    guides = Guides(tokenizer, tokenizer.vocab_size)
    sampler = Sampler(
        SamplingParams(max_new_tokens=40, guide=(guide := Guide("choice", '["é日😀"]'))),
        [1],
        tokenizer.vocab_size,
        guides.constraint(guide),
    )
    while sampler.finish_reason() is None if sampler.output else True:
        sampler.sample(np.zeros(tokenizer.vocab_size, np.float32))
    assert tokenizer.decode(sampler.output) == "é日😀"


BAD = [
    ("xml", "x", "kind"), ("regex", "", "text"), ("json_schema", "{", "guide"), ("json_schema", '{"type": "obj"}', "guide"), ("json_schema", "[]", "guide"),
    ("regex", "(a", "guide"), ("choice", "[]", "text"), ("choice", "{", "text"), ("choice", "[1]", "text"), ("choice", '["a"', "text"),
    ("choice", "[" * 100_000, "text"), ("ebnf_grammar", "nonsense", "guide"), ("lark_grammar", "start: nobody", "guide"),
    ("regex", "x" * 300_000, "text"), 
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "named"), BAD)
def test_a_guide_that_cannot_be_followed_is_refused_in_a_line(kind, text, named):
    with pytest.raises(RequestError, match=f"guide.*{named}" if named != "guide" else "^guide") as caught:
        answer("example", Guide(kind, text), 1, most=5)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_where_the_library_is_missing_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingRuntimeError, match=r"ngpt-deploy\[guided\]"):
        Guides(EXAMPLE, EXAMPLE.vocab_size).constraint(Guide("json"))


def test_an_engine_keeps_to_it_beside_others_that_are_free(tiny_engine_folder):
    with load_engine(tiny_engine_folder, num_slots=3, threads=1) as engine:
        free = engine.generate_text("def f", 24)
        prompt = engine.tokenizer.encode("x = ")
        guide = Guide("json_schema", json.dumps(SCHEMA))
        handles = [engine.submit(prompt, 120, guide=guide, temperature=1.0, seed=seed) for seed in range(4)]
        assert engine.generate_text("def f", 24) == free
        for handle in handles:
            result = handle.result()
            text = engine.tokenizer.decode(result.tokens)
            if result.finish_reason != "length":
                jsonschema.validate(json.loads(text), SCHEMA)
        assert engine.generate_text("is it", 9, guide=Guide("choice", '["yes", "no"]')) in ("yes", "no")
        same = [engine.generate([prompt], 60, guide=guide)[0] for _ in range(2)]
        assert same[0] == same[1]
        with pytest.raises(RequestError, match="guide"):
            engine.generate_text("x", 4, guide=Guide("regex", "("))
        with pytest.raises(RequestError, match="Submit it through the engine"):
            engine.scheduler.submit(prompt, SamplingParams(guide=guide))
        assert engine.scheduler.stats().active == 0


# --- what OpenAI's clients ask for besides


def test_a_bias_moves_the_choice_and_leaves_the_reported_probability():
    logits = np.array([1.0, 3.0, 2.0, 0.0], np.float32)
    assert Sampler(SamplingParams(), [], 4).sample(logits)[0] == 1
    biased = Sampler(SamplingParams(logit_bias={2: 1.5, 1: -100.0}, logprobs=True), [], 4)
    token, logprob = biased.sample(logits)
    assert token == 2 and logprob == pytest.approx(2.0 - np.log(np.exp([1.0, 3.0, 2.0, 0.0]).sum()))
    assert Sampler(SamplingParams(logit_bias=[(0, 1e38), (3, 3e38)]), [], 4).sample(logits)[0] == 3
    for bad in ({-1: 1.0}, {1: float("nan")}, {1: "x"}, [(1, 2.0), (1, 3.0)], 5, {True: 1.0}, {1.5: 1.0}, "12"):
        with pytest.raises(RequestError, match="logit_bias"):
            SamplingParams(logit_bias=bad)
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias={4: 1.0}).check_vocabulary(4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, -2.0, 1.5]), min_size=1, max_size=40), st.integers(1, 20))
def test_the_most_probable_tokens_in_order(values, count):
    from engines.runtime.sampler import top_log_probabilities

    logits = np.array(values, np.float32)
    found = top_log_probabilities(logits, count)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert [token for token, _ in found] == sorted(range(len(values)), key=lambda token: (-values[token], token))[:count]
    assert [value for _, value in found] == pytest.approx([exact[token] for token, _ in found], abs=1e-5)


def test_an_engine_reports_them_beside_each_token(tiny_engine_folder):
    with load_engine(tiny_engine_folder, num_slots=1, threads=1) as engine:
        result = engine.submit([5, 6], 6, ignore_eos=True, logprobs=True, top_logprobs=3).result()
        assert [row[0] for row in result.top_logprobs] == list(zip(result.tokens, result.logprobs, strict=True))
        assert all(len(row) == 3 and row[0][1] >= row[1][1] >= row[2][1] for row in result.top_logprobs)
        with pytest.raises(RequestError, match="top_logprobs"):
            engine.submit([5], 2, top_logprobs=21)
