"""From tensors to options, without a server."""

from __future__ import annotations

import numpy as np
import pytest

from triton_repo.interface import TEXT, TOKENS
from triton_repo.serving_inputs import (
    InputError,
    parse_options,
    prompt_tokens,
    sequences_array,
    sequences_of,
    text_of,
    words_of,
)

NEUTRAL = {
    "beam_width": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "top_k": 0,
    "top_p": 0.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "return_context_logits": False,
    "min_tokens": 0,
    "return_log_probs": False,
}


def tensors(**values):
    return {name: np.asarray([[value]]) for name, value in values.items()}


def test_neutral_values_ask_for_nothing():
    plain = parse_options(tensors(max_tokens=5), TEXT, 100)
    assert parse_options(tensors(max_tokens=5, **NEUTRAL), TEXT, 100).sampling == plain.sampling == {"max_new_tokens": 5}


def test_the_older_name_of_min_tokens_is_taken_too():
    new = parse_options(tensors(max_tokens=9, min_tokens=4), TEXT, 100)
    assert parse_options(tensors(max_tokens=9, min_length=4), TEXT, 100) == new
    assert parse_options(tensors(max_tokens=9, min_length=4, min_tokens=4), TEXT, 100) == new
    with pytest.raises(InputError, match=r"min_length: expected 0 to max_tokens \(9\), found 10"):
        parse_options(tensors(max_tokens=9, min_length=10), TEXT, 100)
    with pytest.raises(InputError, match=r"min_length: expected one of min_length and min_tokens, found both \(4, 5\)"):
        parse_options(tensors(max_tokens=9, min_length=4, min_tokens=5), TEXT, 100)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request_output_len", 0),
        ("request_output_len", -3),
        ("beam_width", 2),
        ("num_return_sequences", 2),
        ("len_penalty", 2.0),
        ("runtime_top_k", -1),
        ("runtime_top_p", 1.5),
        ("min_p", 1.01),
        ("min_p", -0.1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("repetition_penalty", 0.0),
        ("min_tokens", -1),
        ("end_id", 100),
        ("end_id", -2),
    ],
)
def test_what_cannot_be_served_is_refused_by_the_clients_own_name(name, value):
    with pytest.raises(InputError, match=f"^{name}: "):
        parse_options(tensors(**{"request_output_len": 4, name: value}), TOKENS, 100)


def test_missing_length_and_several_values_are_refused():
    with pytest.raises(InputError, match="^max_tokens: "):
        parse_options({}, TEXT, 100)
    with pytest.raises(InputError, match="^top_k: .*one value"):
        parse_options({**tensors(max_tokens=1), "top_k": np.ones((1, 2), np.int32)}, TEXT, 100)


def test_end_id():
    assert parse_options(tensors(max_tokens=1, end_id=7), TEXT, 100).sampling["eos_token_ids"] == (7,)
    assert parse_options(tensors(max_tokens=1, end_id=-1), TEXT, 100).sampling["ignore_eos"] is True


@pytest.mark.parametrize("sequences", [(), ((1,),), ((1, 2, 3), (4,)), ((5, 6), (7, 8), (9,))])
def test_word_lists_survive_the_round_trip(sequences):
    assert sequences_of({"w": sequences_array(sequences)[None]}, "w", 100) == sequences


@pytest.mark.parametrize("bad", [[[1, 2], [3, -1]], [[1, 2], [2, 1]], [[1, 100], [2, -1]], [[-5, 2], [2, -1]], [[1, 2]]])
def test_malformed_word_lists_are_refused(bad):
    with pytest.raises(InputError, match="^w: "):
        sequences_of({"w": np.asarray([bad], np.int32)}, "w", 100)


def test_all_zero_word_list_is_empty():
    assert sequences_of({"w": np.zeros((1, 2, 1), np.int32)}, "w", 100) == ()


def test_prompts():
    ids = {"input_ids": np.asarray([[5, 6, 7]], np.int32), "input_lengths": np.asarray([[2]], np.int32)}
    assert prompt_tokens(ids, 100) == [5, 6]
    for broken, name in (
        ({"input_ids": np.asarray([[5, 100]])}, "input_ids"),
        ({"input_ids": np.asarray([[-1]])}, "input_ids"),
        ({"input_ids": np.zeros((1, 0), np.int32)}, "input_ids"),
        ({"input_ids": np.zeros((2, 3), np.int32)}, "input_ids"),
        ({**ids, "input_lengths": np.asarray([[4]])}, "input_lengths"),
        ({**ids, "input_lengths": np.asarray([[0]])}, "input_lengths"),
    ):
        with pytest.raises(InputError, match=f"^{name}: "):
            prompt_tokens(broken, 100)


def test_text_must_be_utf8():
    assert text_of({"t": np.asarray([["héllo".encode()]], object)}, "t") == "héllo"
    with pytest.raises(InputError, match="^t: expected UTF-8"):
        text_of({"t": np.asarray([[b"\xff"]], object)}, "t")
    assert words_of({"w": np.asarray([[b"", b"a"]], object)}, "w") == ["a"]
