"""Text streams lose nothing and split nothing: held against decoding everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models

from engines.runtime import EngineFileError, RequestError, TextStream, Tokenizer
from engines.runtime.text import StopStrings
from tests.runtime.making import byte_level, sentencepiece_like

BYTES, PIECES = Tokenizer(byte_level()), Tokenizer(sentencepiece_like())
KINDS = {"bytes": BYTES, "pieces": PIECES}
TEXTS = [
    "def f(x):\n    return x  # trailing  ",
    "  leading spaces",
    "naïve café",
    "日本語 中文 漢字",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "a<tool call>b 漢字c",
    "\ufffd real replacement \ufffd\ufffd",
    " ",
    "\n\n\t",
    "a\u0301 combining",
]
thoroughly = settings(deadline=None, max_examples=150)
texts = st.one_of(
    st.text(max_size=40), st.text(st.sampled_from(" ab\n漢日😀é👩\u200d\ufffd"), max_size=30), st.sampled_from(TEXTS)
)


def pieces_of(tokenizer: Tokenizer, tokens: list[int], **options: object) -> list[str]:
    stream = TextStream(tokenizer, **options)  # type: ignore[arg-type]
    return [*(stream.push(token) for token in tokens), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@thoroughly
@given(text=texts)
@example(text="日本語 👩‍👩‍👧‍👦 <tool call> 漢字")
def test_pieces_join_to_the_text(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)
    if kind == "bytes":
        assert "".join(pieces) == text


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@thoroughly
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(kind: str, skip: bool, data: st.DataObject) -> None:
    """Also broken bytes, special tokens in the middle of a character, and ids that the tokenizer does not know."""
    tokenizer = KINDS[kind]
    ids = st.integers(0, tokenizer.vocab_size + 3)
    high = [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode([i])]
    tokens = data.draw(st.lists(st.one_of(ids, st.sampled_from(high), st.sampled_from([0, 1, 2])), max_size=30))
    pieces = pieces_of(tokenizer, tokens, skip_special_tokens=skip)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=skip)


@thoroughly
@given(text=st.text(max_size=40).filter(lambda t: "\ufffd" not in t))
def test_no_piece_ends_inside_a_character(text: str) -> None:
    for piece in pieces_of(BYTES, BYTES.encode(text)):
        assert "\ufffd" not in piece and piece in text


def test_text_comes_as_soon_as_it_is_certain() -> None:
    """Holding everything back until the end would pass the tests above."""
    stream = TextStream(BYTES)
    for text in ("plain words here", "mixed 日 and 😀 end"):
        tokens, seen = BYTES.encode(text, add_special_tokens=False), ""
        for at, token in enumerate(tokens):
            seen += stream.push(token)
            whole = BYTES.decode(tokens[: at + 1])
            assert seen == whole.rstrip("\ufffd")
        stream = TextStream(BYTES)


def test_broken_bytes_do_not_hold_back_what_follows() -> None:
    lone = next(i for i in range(BYTES.vocab_size) if BYTES.raw.id_to_token(i) == "Ģ")  # a continuation byte by itself
    tokens = [lone, lone, *BYTES.encode("after", add_special_tokens=False)]
    stream = TextStream(BYTES)
    assert "".join(stream.push(token) for token in tokens) == BYTES.decode(tokens) == "\ufffd\ufffdafter"


def test_the_stream_is_what_hugging_face_decodes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), clean_up_tokenization_spaces=False)
    for text in TEXTS:
        tokens = BYTES.encode(text)
        assert "".join(pieces_of(BYTES, tokens)) == other.decode(tokens, skip_special_tokens=True) == text
        assert other(text)["input_ids"] == tokens


def test_a_long_stream_stays_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window decoded at each push is short, however long the stream."""
    longest = 0
    decode = Tokenizer.decode

    def counting(self: Tokenizer, tokens: list[int], **options: bool) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(self, tokens, **options)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    pieces_of(BYTES, BYTES.encode("some words and 日本語 and 😀. " * 60))
    assert longest <= 16


# Stop strings.


def hand_written_stop(text: str, stop: list[str]) -> str:
    """Letter by letter: as soon as what is there ends in a stop string, cut before it."""
    for end in range(len(text) + 1):
        fitting = [s for s in stop if text[:end].endswith(s)]
        if fitting:
            return text[: end - len(max(fitting, key=len))]
    return text


@thoroughly
@given(
    text=st.text(st.sampled_from("ab \n"), max_size=25),
    stop=st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 25), max_size=8),
)
@example(text="xabc", stop=["abc", "b"], cuts=[2])
def test_stop_strings_do_not_depend_on_the_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    stops, out = StopStrings(stop), ""
    bounds = [0, *sorted(cuts), len(text)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        out += stops.push(text[begin:end])
    out += stops.flush()
    assert out == hand_written_stop(text, stop)
    assert (stops.matched is not None) == any(s in text for s in stop)


@thoroughly
@given(
    text=st.text(st.sampled_from("ab 漢😀\n"), max_size=25), stop=st.text(st.sampled_from("ab 漢😀\n"), min_size=1, max_size=3)
)
def test_stop_strings_across_tokens(text: str, stop: str) -> None:
    pieces = pieces_of(BYTES, BYTES.encode(text), stop=[stop])
    assert "".join(pieces) == hand_written_stop(text, [stop])


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(BYTES, ["\n\n"])
    tokens = [BYTES.encode(c, add_special_tokens=False)[0] for c in "a\nb\n\nc"]
    assert [stream.push(token) for token in tokens] == ["a", "", "\nb", "", "", ""]
    assert stream.stopped and stream.stop_string == "\n\n" and stream.flush() == ""


def test_a_held_back_beginning_is_given_at_the_end() -> None:
    assert pieces_of(BYTES, BYTES.encode("ab", add_special_tokens=False), stop=["bc"])[-1] == "b"


def test_stop_strings_are_not_searched_in_the_first_tokens() -> None:
    tokens = [BYTES.encode(c, add_special_tokens=False)[0] for c in "axbxc"]
    assert "".join(pieces_of(BYTES, tokens, stop=["x"])) == "a"
    assert "".join(pieces_of(BYTES, tokens, stop=["x"], min_tokens=2)) == "axb"
    assert "".join(pieces_of(BYTES, tokens, stop=["x"], min_tokens=9)) == "axbxc"


@pytest.mark.parametrize("stop", ["text", [""], [3]])
def test_bad_stop_strings(stop: object) -> None:
    with pytest.raises(RequestError, match="stop: expected"):
        TextStream(BYTES, stop)  # type: ignore[arg-type]


# The tokenizer.


def test_encoding_takes_bytes_and_refuses_what_is_not_utf8() -> None:
    assert BYTES.encode("é".encode()) == BYTES.encode("é") != BYTES.encode("é", add_special_tokens=False)
    for bad in (b"\xff\xfe", "\ud800"):
        with pytest.raises(RequestError, match="UTF-8"):
            BYTES.encode(bad)


def test_a_negative_token_cannot_be_decoded() -> None:
    for token in (-1, 2**32):
        with pytest.raises(RequestError, match="token"):
            BYTES.decode([token])
        with pytest.raises(RequestError, match="token"):
            TextStream(BYTES).push(token)


def test_truncation_and_padding_saved_in_the_file_are_off(tmp_path: Path) -> None:
    raw = RawTokenizer.from_str(byte_level().to_str())
    raw.enable_truncation(4)
    raw.enable_padding(length=32)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("a longer text than four") == BYTES.encode("a longer text than four")


def test_a_tokenizer_without_a_decoder() -> None:
    raw = RawTokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    assert "".join(pieces_of(Tokenizer(raw), [0, 1, 1, 0])) == raw.decode([0, 1, 1, 0]) == "a b b a"
    raw.decoder = decoders.Fuse()
    assert "".join(pieces_of(Tokenizer(raw), [0, 1, 1, 0])) == "abba"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"{}", "tokenizers library"), (b"\xff", "UTF-8"), (b"", "tokenizers library")],
)
def test_bad_tokenizer_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(EngineFileError, match=message):
        Tokenizer.load(tmp_path)


def test_a_huge_tokenizer_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.runtime.text.MAX_TOKENIZER_BYTES", 100)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(EngineFileError, match="at most 100 bytes"):
        Tokenizer.load(tmp_path)


def test_a_huge_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.runtime.text.MAX_TEXT_CHARS", 10)
    with pytest.raises(RequestError, match="at most 10 characters, found 11"):
        BYTES.encode("x" * 11)


def test_a_space_before_the_first_new_word_is_kept_where_the_prompt_is_known() -> None:
    """Decoders of this kind drop a space at the start of a text, and the answer is not the start."""
    prompt = PIECES.encode("ab", add_special_tokens=False)
    new = PIECES.encode("ab ba", add_special_tokens=False)[len(prompt) :]
    text = "".join(pieces_of(PIECES, new, context=prompt))
    assert text == PIECES.decode([*prompt, *new])[len(PIECES.decode(prompt)) :] and text.startswith(" ")
    assert not "".join(pieces_of(PIECES, new)).startswith(" ")
    stream = TextStream(PIECES, stop=[" b"], context=prompt)
    assert "".join(stream.push(token) for token in new) == "" and stream.stopped


@pytest.mark.parametrize("kind", KINDS)
@thoroughly
@given(before=texts, after=texts)
def test_text_after_a_prompt_is_what_the_two_decode_to_together(kind: str, before: str, after: str) -> None:
    tokenizer = KINDS[kind]
    prompt, new = (tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
    recent = [token for token in prompt[-8:] if not tokenizer.is_silent(token)]
    whole, known = tokenizer.decode([*recent, *new]), tokenizer.decode(recent)
    assert "".join(pieces_of(tokenizer, new, context=prompt)) == whole[len(known) - known.endswith("\ufffd") :]


def test_a_stop_string_that_names_a_special_token_ends_the_text_there() -> None:
    special = next(text for text in ("<|end|>", "</s>", "<s>") if PIECES.special_token(text) is not None)
    tokens = [*PIECES.encode("ab ba", add_special_tokens=False), PIECES.special_token(special), *PIECES.encode("ab")]
    stream = TextStream(PIECES, stop=[special, "zz"])
    assert "".join(stream.push(token) for token in tokens[: tokens.index(PIECES.special_token(special)) + 1]) == "ab ba"
    assert stream.stopped and stream.stop_string == special
    later = TextStream(PIECES, stop=[special], min_tokens=len(tokens))
    assert "".join(later.push(token) for token in tokens) and not later.stopped
    shown = TextStream(PIECES, stop=[special], skip_special_tokens=False)  # then it is in the text, and found there
    assert special not in "".join(shown.push(token) for token in tokens) and shown.stopped
    assert PIECES.special_token("ab") is None and PIECES.special_token("nothing of the kind") is None


def test_what_was_held_back_for_another_stop_string_comes_before_a_special_token() -> None:
    stream = TextStream(PIECES, stop=["</s>", "baa"])
    parts = [stream.push(token) for token in PIECES.encode("ab ba", add_special_tokens=False)]
    assert "".join([*parts, stream.push(PIECES.special_token("</s>"))]) == "ab ba" and stream.stop_string == "</s>"


def test_a_text_that_cannot_be_so_few_tokens_is_refused_by_its_length() -> None:
    longest = max(map(len, BYTES.raw.get_vocab()))
    BYTES.check_length("text_input", "x" * (3 * longest), 3)
    with pytest.raises(RequestError, match="text_input: the prompt is too long: expected at most 2 tokens"):
        BYTES.check_length("text_input", "x" * (3 * longest + 1), 3)
