"""Text spelled with tokens <0xNN> (byte fallback, as Llama 2's tokenizer): each character comes with its last byte."""

from __future__ import annotations

import codecs
from os.path import commonprefix

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines.runtime import TextStream, Tokenizer
from tests.runtime.making import sentencepiece_like

PIECES = Tokenizer(sentencepiece_like())
FAMILY = "👩‍👩‍👧‍👦🇩🇪👍🏽😀日本é"
thoroughly = settings(deadline=None, max_examples=200)
codecs.register_error("one each", lambda error: ("\ufffd" * (error.end - error.start), error.end))  # type: ignore[attr-defined]
CONTINUATIONS = [b"", b"a", *(bytes([byte]) + b"\x80" * more for byte in (0x80, 0x90, 0xA0, 0xBF) for more in range(3))]


def byte_tokens(data: bytes) -> list[int]:
    tokens = [PIECES.raw.token_to_id(f"<0x{byte:02X}>") for byte in data]
    assert None not in tokens
    return [int(token) for token in tokens if token is not None]


def test_emoji_alone_come_one_by_one() -> None:
    stream = TextStream(PIECES)
    for character in FAMILY:
        *first, last = byte_tokens(character.encode())
        assert [stream.push(token) for token in first] == [""] * len(first)
        assert stream.push(last) == character
    assert stream.flush() == ""


@pytest.mark.parametrize("stop", ["😀", "👍🏽", "a😀"])
def test_an_emoji_ends_the_text(stop: str) -> None:
    tokens = [*byte_tokens("😃".encode()), PIECES.raw.token_to_id("a"), *byte_tokens("😀👍🏽日".encode())]
    stream, text, seen = TextStream(PIECES, [stop]), "", []
    for token in tokens:
        text += stream.push(token)
        if stream.stopped:
            break
        seen.append(token)
    assert text == "😃a😀👍🏽".partition(stop)[0] and stream.stop_string == stop
    assert PIECES.decode([*seen, token]).endswith(stop), "it stopped as soon as the stop string was complete"


@thoroughly
@given(
    data=st.lists(st.one_of(st.binary(max_size=4), st.text(st.sampled_from("é日😀a"), max_size=2).map(str.encode))).map(b"".join)
)
@example(data=b"\xf0\x9f\x98\x80\xff\xf0\x9f\x98\x80")
@example(data=b"\xf0\x9f\x98\xf0\x9f\x98\x80\xed\xa0\x80\xc0\x80\xf4\x90\x80\x80")
@example(data=b"\xe6\x97")
def test_a_broken_byte_is_one_replacement_character_and_undoes_nothing(data: bytes) -> None:
    tokens = [*byte_tokens(b"."), *byte_tokens(data)]  # a space at the start would go
    wanted = "." + data.decode("utf-8", "one each")
    assert PIECES.decode(tokens) == wanted
    stream, text = TextStream(PIECES), ""
    for at, token in enumerate(tokens):
        text += stream.push(token)
        known = b"." + data[:at]
        certain = commonprefix([(known + rest).decode("utf-8", "one each") for rest in CONTINUATIONS])
        assert text == certain, "all that no later byte can change, and nothing else"
    assert text + stream.flush() == wanted


@thoroughly
@given(text=st.text(st.sampled_from(" ab\n漢日😀é👩\u200d."), max_size=30))
def test_text_without_broken_bytes_is_what_the_library_decodes(text: str) -> None:
    tokens = PIECES.encode(text)
    for skip in (True, False):
        assert PIECES.decode(tokens, skip_special_tokens=skip) == PIECES.raw.decode(tokens, skip_special_tokens=skip)


def test_a_special_token_inside_a_character_is_passed_over() -> None:
    head, tail = byte_tokens("😀".encode())[:2], byte_tokens("😀".encode())[2:]
    tokens = [*head, 1, *tail]
    assert PIECES.decode(tokens) == PIECES.raw.decode(tokens) == "😀"
    stream = TextStream(PIECES)
    assert [stream.push(token) for token in tokens] == ["", "", "", "", "😀"]


@pytest.mark.parametrize("known", range(5))
def test_a_character_begun_in_the_prompt_comes_whole(known: int) -> None:
    tokens = byte_tokens("é😀".encode())
    prompt, new = tokens[: 2 + known], tokens[2 + known :]
    stream = TextStream(PIECES, context=prompt)
    assert "".join(stream.push(token) for token in new) + stream.flush() == ("" if known == 4 else "😀")


def test_a_character_begun_in_the_prompt_and_never_completed_is_one_replacement_character() -> None:
    stream = TextStream(PIECES, context=byte_tokens("é".encode() + b"\xf0"))
    assert stream.push(PIECES.raw.token_to_id("a")) == "\ufffda"


def test_a_long_run_of_bytes_stays_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    longest, decode = 0, Tokenizer.decode

    def counting(self: Tokenizer, tokens: list[int], **options: bool) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(self, tokens, **options)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    stream = TextStream(PIECES)
    for token in byte_tokens(FAMILY.encode() * 40 + b"\x80\xff\xf0" * 40):
        stream.push(token)
    assert longest <= 8
