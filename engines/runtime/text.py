"""Text and tokens: a bounded tokenizer, and a stream that turns tokens into text piece by piece."""

from __future__ import annotations

import json
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
_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are not (yet) a character


class Tokenizer:
    """tokenizer.json of an engine. `raw` is the tokenizers.Tokenizer."""

    def __init__(self, raw: RawTokenizer) -> None:
        self.raw = raw
        # A ByteFallback decoder reads a run of <0xNN> tokens as a whole, so a later one can undo an earlier one.
        decoder = json.loads(raw.to_str()).get("decoder")
        self._byte_runs = "ByteFallback" in json.dumps(decoder)

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

    def may_change(self, token: int) -> bool:
        """Whether the text of this token can still be changed by the tokens after it."""
        if not self._byte_runs:
            return False
        name = self.raw.id_to_token(token)
        return name is not None and _BYTE_TOKEN.fullmatch(name) is not None


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what may be the start of one."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise RequestError("stop", expected="a list of texts that are not empty", found=repr(stop)[:200])
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text that is certainly before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Tokens in, text out. All that push() and flush() return together is decode(all tokens).

    No piece ends inside a character, and a leading space that a decoder drops only at the start is kept
    elsewhere, for each token is decoded with the ones before it. With `stop`, the text ends before the first stop
    string and `stopped` becomes true.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._stops = StopStrings(stop)
        self._skip = skip_special_tokens
        self._tokens: list[int] = []
        self._start = 0  # first token of the window that is decoded for each push
        self._done = 0  # tokens whose text has been given out
        self._given = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """Adds a token and returns the text that became certain with it (often one word, sometimes nothing)."""
        self._tokens.append(token)
        if self._tokenizer.may_change(token):
            return ""
        before = self._decode(self._tokens[self._start : self._done])
        now = self._decode(self._tokens[self._start :])
        if now.endswith(_UNFINISHED) or len(now) <= len(before) or not now.startswith(before):
            return ""
        piece = now[len(before) :]
        self._start, self._done = self._done, len(self._tokens)
        self._given += piece
        return self._stops.push(piece)

    def flush(self) -> str:
        """The rest of the text, when no more tokens come."""
        whole = self._decode(self._tokens)
        rest = whole[len(self._given) :] if whole.startswith(self._given) else ""
        self._given += rest
        self._start = self._done = len(self._tokens)
        out = self._stops.push(rest)
        return out + self._stops.flush()

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
