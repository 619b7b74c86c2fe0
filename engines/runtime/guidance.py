"""Answers held to a form: JSON, a schema, a regular expression, a list of texts, a grammar.

The library llguidance says which tokens may come next; it is imported when the first guide is asked for.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RawTokenizer

from .errors import MissingRuntimeError, RequestError
from .text import Tokenizer

KINDS = ("json", "json_schema", "regex", "choice", "ebnf_grammar", "lark_grammar")
MAX_GUIDE_CHARS = 1 << 18
MAX_CHOICES = 10_000
JSON_SPACE = "[ \\n]{0,24}"
"""White space between the parts of JSON: enough to indent it, and not so much that a model can go on with it for ever."""
_FORMATS = {"ebnf_grammar": "ebnf", "lark_grammar": "lark"}
_ANY_OBJECT = '{"type": "object"}'
_END = "<|the guide may end here|>"


@dataclass(frozen=True)
class Guide:
    """What an answer is held to.

    kind: "json" (any JSON object; no text), "json_schema", "regex" (of Rust's crate regex; the whole answer matches), "choice" (a
    JSON list of texts, one of which is the answer), "ebnf_grammar" (GBNF, as llama.cpp writes it), "lark_grammar". Raises
    RequestError for another kind, or a text that is missing or too long.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError("guide: kind", expected=", ".join(KINDS), found=repr(self.kind)[:100])
        if not isinstance(self.text, str) or (not self.text and self.kind != "json"):
            found = "nothing" if isinstance(self.text, str) else type(self.text).__name__
            raise RequestError("guide: text", expected=f"the {self.kind}", found=found)
        if len(self.text) > MAX_GUIDE_CHARS:
            raise RequestError("guide: text", expected=f"at most {MAX_GUIDE_CHARS} characters", found=str(len(self.text)))


class Constraint:
    """Where one answer stands in its guide. Used by one thread at a time."""

    def __init__(self, matcher: Any, fill: Callable[[Any, Any], None], size: int, end: int, vocab_size: int) -> None:
        self._matcher, self._fill, self._end, self._vocab_size = matcher, fill, end, vocab_size
        self._mask = np.zeros((1, (size + 31) // 32), np.int32)

    def allowed(self) -> tuple[NDArray[np.bool_], bool]:
        """Bool [V], the tokens that may come next, and whether the answer may end here instead. Raises RequestError for a guide
        that turns out too complex."""
        self._fill(self._matcher, self._mask)
        self._check()
        bits = np.unpackbits(self._mask.view(np.uint8)[0], bitorder="little").astype(bool)
        may_end, bits[self._end] = bool(bits[self._end]), False
        if len(bits) < self._vocab_size:
            bits = np.concatenate([bits, np.zeros(self._vocab_size - len(bits), bool)])
        return bits[: self._vocab_size], may_end

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())


class Guides:
    """Compiles guides for one engine: its tokenizer, and its model's number of tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._made: tuple[Any, Any, int, int] | None = None
        self._lock = threading.Lock()

    def constraint(self, guide: Guide) -> Constraint:
        """The guide, compiled: milliseconds, outside any step of the engine. Raises RequestError for one that cannot be,
        MissingRuntimeError."""
        library, tokens, size, end = self._library()
        text = guide.text
        if guide.kind == "choice":
            text = json.dumps(_choices(text))
        try:
            if guide.kind in ("json", "json_schema"):
                schema = text if guide.kind == "json_schema" else _ANY_OBJECT
                grammar = library.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": JSON_SPACE})
            else:
                grammar = library.grammar_from(_FORMATS.get(guide.kind, guide.kind), text)
        except Exception as error:  # ValueError, or whatever its converter stumbles over
            raise _refused(str(error)) from error
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        fill = importlib.import_module("llguidance.numpy").fill_next_token_bitmask
        return Constraint(matcher, fill, size, end, self._vocab_size)

    def _library(self) -> tuple[Any, Any, int, int]:
        with self._lock:
            if self._made is None:
                try:
                    library = importlib.import_module("llguidance")
                except ImportError as error:
                    raise MissingRuntimeError(
                        "guides need the library llguidance",
                        expected="installed",
                        found="not installed",
                        remedy="Run: pip install 'ngpt-deploy[guided]', or llguidance where the engine is served.",
                    ) from error
                # A token of its own says that a guide may end: which tokens end a text is for each request to say.
                raw = RawTokenizer.from_str(self._tokenizer.raw.to_str())
                raw.add_special_tokens([_END])
                vocabulary = raw.get_vocab(with_added_tokens=True)
                end, size = vocabulary[_END], max(vocabulary.values()) + 1
                self._made = library, library.LLTokenizer(raw.to_str(), n_vocab=size, eos_token=end), size, end
            return self._made


def _choices(text: str) -> list[str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError("guide: text", expected="a JSON list of texts", found=str(error)[:200]) from error
    if not isinstance(found, list) or not found or not all(isinstance(each, str) and each for each in found):
        raise RequestError("guide: text", expected="a JSON list of texts that are not empty", found=repr(found)[:100])
    if len(found) > MAX_CHOICES:
        raise RequestError("guide: text", expected=f"at most {MAX_CHOICES} texts", found=str(len(found)))
    return found


def _refused(reason: str) -> RequestError:
    return RequestError("guide", expected="one that can be followed", found=" ".join(reason.split())[:300])
