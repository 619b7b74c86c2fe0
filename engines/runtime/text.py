"""Text and tokens: a bounded tokenizer, and a stream that turns tokens into text piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer

from .errors import EngineFileError, RequestError
from .manifest import read_bounded

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEXT_CHARS = 8 << 20
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTEXT = 8  # tokens of a prompt with which the first new ones are decoded: more than a word has
_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character


class Tokenizer:
    """tokenizer.json of an engine. `raw` is the tokenizers.Tokenizer."""

    def __init__(self, raw: RawTokenizer) -> None:
        self.raw = raw
        # A file may have been saved with either on; a prompt must be encoded whole and as it is.
        raw.no_truncation()
        raw.no_padding()
        # A ByteFallback decoder reads a run of <0xNN> tokens as a whole.
        self._byte_runs = raw.decoder is not None and b"ByteFallback" in bytes(raw.decoder.__getstate__())

        self._special = {at for at, token in raw.get_added_tokens_decoder().items() if token.special}
        self._longest = 0

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json, or the one in a folder (at most 256 MiB). Raises EngineFileError."""
        path = Path(path)
        path = path / TOKENIZER_NAME if path.is_dir() else path
        remedy = "Put the tokenizer.json of the model there."
        if not path.is_file():
            raise EngineFileError(f"{path}", expected="a tokenizer", found="no such file", remedy=remedy)
        try:
            text = read_bounded(path, MAX_TOKENIZER_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise EngineFileError(f"{path}", expected="UTF-8", found=str(error), remedy=remedy) from error
        try:
            return cls(RawTokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exception
            raise EngineFileError(
                f"{path}", expected="a tokenizer of the tokenizers library", found=str(error)[:200], remedy=remedy
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of known tokens, added ones included."""
        return int(self.raw.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str | bytes, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises RequestError for text that is not UTF-8 or longer than 8 Mi characters."""
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8")
            text.encode("utf-8")
        except UnicodeError as error:
            raise RequestError(
                "text", expected="valid UTF-8", found=str(error), remedy="Send the text encoded as UTF-8."
            ) from error
        if len(text) > MAX_TEXT_CHARS:
            raise RequestError(
                "text", expected=f"at most {MAX_TEXT_CHARS} characters", found=str(len(text)), remedy="Shorten the text."
            )
        return list(self.raw.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know give nothing. Raises RequestError if negative."""
        for token in tokens:
            if token < 0 or token >= 1 << 32:
                raise RequestError("token", expected="an id of at least 0", found=str(token))
        return str(self.raw.decode([int(t) for t in tokens], skip_special_tokens=skip_special_tokens))

    def is_silent(self, token: int, *, skip_special_tokens: bool = True) -> bool:
        """Whether decode() passes over this token: an id it does not know, or a special token."""
        if skip_special_tokens and token in self._special:
            return True
        return 0 <= token < 1 << 32 and self.raw.id_to_token(token) is None

    def special_token(self, text: str) -> int | None:
        """The id of the special token that is spelled so, or None."""
        token = self.raw.token_to_id(text)
        return token if token in self._special else None

    def check_length(self, name: str, text: str, tokens: int) -> None:
        """Raise RequestError, by the name of the input, for a text that cannot be as few as `tokens` tokens: what is so long
        need not be tokenised to be refused."""
        if not self._longest:
            self._longest = max(map(len, self.raw.get_vocab(with_added_tokens=True)), default=1)
        if len(text) > tokens * self._longest:
            raise RequestError(
                f"{name}: the prompt is too long",
                expected=f"at most {tokens - 1} tokens",
                found=f"{len(text)} characters, which are more",
                remedy="Shorten it.",
            )

    def byte_of(self, token: int) -> int | None:
        """The byte that a token stands for where single bytes are spelled <0xNN>, or None."""
        name = self.raw.id_to_token(token) if self._byte_runs else None
        return int(name[3:5], 16) if name is not None and _BYTE_TOKEN.fullmatch(name) else None


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what may be the start of one.

    The first is the one that is complete first, so how the text is cut into pieces makes no difference.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise RequestError("stop", expected="a list of texts that are not empty", found=repr(stop)[:200])
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The part of the text that is certainly before any stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class _Bytes:
    """A run of single bytes, turned into characters as soon as each is whole; U+FFFD for each byte that belongs to none."""

    def __init__(self) -> None:
        self._held = b""

    def push(self, byte: int) -> str:
        text, self._held = "", self._held + bytes([byte])
        while self._held:
            try:
                whole, self._held = self._held.decode("utf-8"), b""
                return text + whole
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    return text
                text, self._held = text + _UNFINISHED, self._held[1:]
        return text

    def flush(self) -> str:
        held, self._held = self._held, b""
        return _UNFINISHED * len(held)


class TextStream:
    """Tokens in, text out: all that push() and flush() return together is decode(all tokens).

    But for one thing, which is the same streamed or not: a decoder of the ByteFallback kind turns a whole run of single bytes
    into replacement characters when one of them is wrong, an emoji before it included. Here what was right stays.

    No piece ends inside a character, and a leading space that a decoder drops only at the start is kept
    elsewhere, for each token is decoded with the ones before it, those of the prompt (`context`) included. With `stop`, the
    text ends before the first stop string and `stopped` becomes true; a stop string that names a special token, which is not
    in the text, ends it where that token comes. The text of the first `min_tokens` tokens is not searched.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = StopStrings(stop)
        named = {tokenizer.special_token(text): text for text in stop} if skip_special_tokens else {}
        self._stop_tokens = {token: text for token, text in named.items() if token is not None}
        self._skip = skip_special_tokens
        self._unsearched = min_tokens
        # A short window is decoded at each push: tokens whose text is out already, then those still to be told.
        self._window: list[int] = []
        self._settled = 0
        self._given = 0  # characters of the window's text that are out
        self._run: _Bytes | None = None  # while the last tokens are single bytes, whose text is not the window's affair
        for token in context[-_CONTEXT:]:
            if not tokenizer.is_silent(token, skip_special_tokens=skip_special_tokens):
                self._window.append(token)
        if self._window:
            self._settled = len(self._window)
            text = tokenizer.decode(self._window, skip_special_tokens=skip_special_tokens)
            self._given = len(text) - text.endswith(_UNFINISHED)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.matched is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met."""
        return self._stops.matched

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain with it (often one word, sometimes nothing)."""
        if token in self._stop_tokens and self._unsearched <= 0:
            rest = self.flush()  # what was held back came before it
            self._stops.matched = self._stop_tokens[token]
            return rest
        if self._tokenizer.is_silent(token, skip_special_tokens=self._skip):
            return self._search("")  # left out of the window too: bytes before and after it may make one character
        before = self._enter_or_leave_run(byte := self._tokenizer.byte_of(token))
        self._window.append(token)
        if byte is not None and self._run is not None:
            return self._search(before + self._run.push(byte))
        text = self._tokenizer.decode(self._window, skip_special_tokens=self._skip)
        # Bytes that end in the middle of a character show as one replacement character, the last.
        unfinished = text.endswith(_UNFINISHED)
        certain = len(text) - unfinished
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if not unfinished and piece:
            self._slide()
        return self._search(before + piece)

    def flush(self) -> str:
        """The rest of the text, when no more tokens come."""
        piece = self._rest()
        rest = piece if self._unsearched >= 0 else self._stops.push(piece)
        return rest + self._stops.flush()

    def _rest(self) -> str:
        """What is still to be told of the tokens so far, when what follows cannot change it."""
        if self._run is not None:
            run, self._run = self._run, None
            self._window = self._window[-_CONTEXT:]
            self._settled = len(self._window)
            self._given = len(self._tokenizer.decode(self._window, skip_special_tokens=self._skip))
            return run.flush()
        text = self._tokenizer.decode(self._window, skip_special_tokens=self._skip)
        piece, self._given = text[self._given :], len(text)
        return piece

    def _enter_or_leave_run(self, byte: int | None) -> str:
        """The text that is certain because a run of single bytes begins or ends here."""
        if (byte is None) == (self._run is None):
            return ""
        piece = self._rest()
        self._run = None if byte is None else _Bytes()
        return piece

    def _slide(self) -> None:
        """Leave in the window only what was added since the last slide: it ends with a whole character, and gives
        the next token the context its text depends on."""
        self._window = self._window[self._settled :]
        self._settled = len(self._window)
        self._given = len(self._tokenizer.decode(self._window, skip_special_tokens=self._skip))

    def _search(self, piece: str) -> str:
        self._unsearched -= 1
        return piece if self._unsearched >= 0 else self._stops.push(piece)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
