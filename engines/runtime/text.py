"""Text and tokens: a bounded tokenizer, and a stream that turns tokens into text piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RawTokenizer

from .errors import EngineFileError, RequestError
from .manifest import read_bounded

TOKENIZER_NAME = "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 << 20
MAX_TEXT_CHARS = 8 << 20
_CONTEXT = 8  # tokens of a prompt with which the first new ones are decoded: more than a word has
_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character


class Tokenizer:
    """tokenizer.json of an engine. `raw` is the tokenizers.Tokenizer."""

    def __init__(self, raw: RawTokenizer) -> None:
        self.raw = raw
        # A file may have been saved with either on; a prompt must be encoded whole and as it is.
        raw.no_truncation()
        raw.no_padding()
        # With a ByteFallback decoder: the ids of the tokens <0xNN>, and the byte that each one is.
        self._bytes: dict[int, int] = {}
        if raw.decoder is not None and b"ByteFallback" in bytes(raw.decoder.__getstate__()):
            named = ((raw.token_to_id(name), byte) for byte in range(256) for name in (f"<0x{byte:02X}>", f"<0x{byte:02x}>"))
            self._bytes = {token: byte for token, byte in named if token is not None}
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
        """Text of token ids; ids that the tokenizer does not know give nothing. Raises RequestError if negative.

        Tokens <0xNN> are bytes (a ByteFallback decoder, as Llama 2's). A byte that belongs to no character is one U+FFFD, and the
        characters beside it stay. The tokenizers library turns those to U+FFFD too, as far as byte follows on byte; with its rule
        no emoji could be shown before all bytes after it are known.
        """
        for token in tokens:
            if token < 0 or token >= 1 << 32:
                raise RequestError("token", expected="an id of at least 0", found=str(token))
        ids = [int(token) for token in tokens]
        if self._bytes.keys().isdisjoint(ids):
            return str(self.raw.decode(ids, skip_special_tokens=skip_special_tokens))
        ids = [token for token in ids if not self.is_silent(token, skip_special_tokens=skip_special_tokens)]
        names, at = [], 0
        while at < len(ids):
            size = self._character(ids, at)
            names += [str(self.raw.id_to_token(token)) for token in ids[at : at + (size or 1)]]
            if size:
                names.append("")  # a token that is no byte, and has no text: the decoder reads the bytes before it by themselves
            at += size or 1
        return str(self.raw.decoder.decode(names))

    def _character(self, ids: Sequence[int], at: int) -> int:
        """How many tokens from `at` on are the bytes of one character, or 1 for a broken byte; 0 if there is no byte there."""
        first = self._bytes.get(ids[at])
        if first is None:
            return 0
        size = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)
        try:
            bytes(self._bytes[token] for token in ids[at : at + size]).decode("utf-8")
        except (KeyError, UnicodeDecodeError):
            return 1
        return size

    def unfinished(self, tokens: Sequence[int], text: str) -> int:
        """How many characters at the end of `text`, which is decode(tokens), the tokens after them may still change."""
        if not tokens or tokens[-1] not in self._bytes:
            # Byte-level tokenizers: bytes that end in the middle of a character show as one replacement character.
            return int(text.endswith(_UNFINISHED))
        for size in (3, 2, 1):
            end = tokens[-size:]
            if len(end) == size and all(token in self._bytes for token in end):
                try:
                    bytes(self._bytes[token] for token in end).decode("utf-8")
                except UnicodeDecodeError as error:
                    if error.start == 0 and error.reason == "unexpected end of data":
                        return size  # each of these bytes is one replacement character until the rest comes
        return 0

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


class TextStream:
    """Tokens in, text out: all that push() and flush() return together is decode(all tokens).

    A character comes with the token that completes it, and no piece ends inside one. A leading space that a decoder drops only at
    the start is kept elsewhere, for each token is decoded with the ones before it, those of the prompt (`context`) included. With
    `stop`, the text ends before the first stop string and `stopped` becomes true; a stop string that names a special token, which
    is not in the text, ends it where that token comes. The text of the first `min_tokens` tokens is not searched.
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
        for token in context[-_CONTEXT:]:
            if not tokenizer.is_silent(token, skip_special_tokens=skip_special_tokens):
                self._window.append(token)
        if self._window:
            self._settled = len(self._window)
            text = tokenizer.decode(self._window, skip_special_tokens=skip_special_tokens)
            self._given = len(text) - tokenizer.unfinished(self._window, text)

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
        self._window.append(token)
        text = self._tokenizer.decode(self._window, skip_special_tokens=self._skip)
        unfinished = self._tokenizer.unfinished(self._window, text)
        certain = len(text) - unfinished
        piece = text[self._given : certain]
        self._given = max(self._given, certain)
        if not unfinished and piece:
            self._slide()
        return self._search(piece)

    def flush(self) -> str:
        """The rest of the text, when no more tokens come."""
        text = self._tokenizer.decode(self._window, skip_special_tokens=self._skip)
        piece, self._given = text[self._given :], len(text)
        rest = piece if self._unsearched >= 0 else self._stops.push(piece)
        return rest + self._stops.flush()

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
