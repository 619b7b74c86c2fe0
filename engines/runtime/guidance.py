"""Guided decoding: which tokens a request's guide allows next. The library llguidance compiles guides and keeps their state."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RawTokenizer

from .errors import CapacityError, MissingRuntimeError, RequestError
from .guide import Guide

MAX_COMPILES = 4
"""So many guides are compiled at a time, those that were given up included."""
MAX_SECONDS = 10.0
"""A guide that is not compiled after so many seconds is refused."""
# A little white space between the parts of JSON. Without a limit a model that prefers spaces never comes to an end.
JSON_SPACE = r"[\x20\x0A\x0D\x09]{1,24}"
# llguidance's own limits (version 1.9), written down so that another version cannot change them. Their unit is its own work.
_LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,  # its default is 250000, which is up to 500 MB for one request
    "max_grammar_size": 500_000,
    "verbose_errors": False,  # true quotes the state and the grammar
}


class GuideMatcher:
    """How far one request's answer has come in its guide. For one thread at a time."""

    def __init__(self, matcher: Any, vocab_size: int, end_tokens: Sequence[int]) -> None:
        self._matcher, self._size = matcher, vocab_size
        self._ends = np.array([token for token in end_tokens if token < vocab_size], dtype=np.int64)
        self._mask: NDArray[np.bool_] | None = None

    @property
    def accepting(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    def allowed(self) -> NDArray[np.bool_]:
        """Bool [V]: the tokens that may come next; end tokens are not among them, see `accepting`. Do not change it.

        Raises RequestError where the guide is too complicated for llguidance's limits.
        """
        if self._mask is None:
            bits = _calling(self._matcher.compute_bitmask)
            self._check()
            # Ids that only the model has are past the end of the bits, and come out as False.
            mask = np.unpackbits(np.frombuffer(bits, np.uint8), count=self._size, bitorder="little").view(np.bool_)
            mask[self._ends] = False
            self._mask = mask
        return self._mask

    def advance(self, token: int) -> bool:
        """Go on by a token that was chosen, no end token. Returns whether the answer is complete: nothing can follow.

        Raises RequestError for a token that is not allowed, and as `allowed`.
        """
        self._mask = None
        _calling(self._matcher.consume_token, token)
        self._check()
        return self.accepting and (bool(self._matcher.is_stopped()) or not self.allowed().any())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())


class GuideCompiler:
    """Compiles guides for one engine. All methods may be called from any thread.

    Args:
        tokenizer: the engine's, or None where it has none; then every guide is refused.
        vocab_size: V of the model. Tokens that the tokenizer does not have are never allowed.
    """

    def __init__(self, tokenizer: RawTokenizer | None, vocab_size: int) -> None:
        self._raw, self._size = tokenizer, vocab_size
        self._vocabulary: Any = None
        self._end = -1
        self._lock = threading.Lock()
        self._room = threading.Semaphore(MAX_COMPILES)

    def prepare(self) -> None:
        """Read the vocabulary, which takes a second or two where it is large; otherwise the first guide does.

        Raises MissingRuntimeError without llguidance, RequestError for an engine whose tokenizer cannot guide.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary(_library())

    def compile(self, guide: Guide, end_tokens: Sequence[int] = ()) -> GuideMatcher:
        """The matcher of a new request. `end_tokens` end its text: the guide's text has none of them inside.

        Raises RequestError naming "guide" for a guide that is wrong, too complicated, or satisfied by no text at all;
        CapacityError where too many are being compiled; and as `prepare`.
        """
        self.prepare()
        if not self._room.acquire(timeout=MAX_SECONDS):
            raise CapacityError(
                "guides are being compiled", expected=f"at most {MAX_COMPILES} at a time", remedy="Try again later."
            )
        done: list[GuideMatcher | BaseException] = []

        def work() -> None:
            try:
                done.append(self._compile(guide, end_tokens))
            except BaseException as error:  # for the caller, who waits in another thread
                done.append(error)
            finally:
                self._room.release()

        # The library cannot be interrupted, and its limits do not bound all that it does; the caller can go on, at least.
        worker = threading.Thread(target=work, name="guide", daemon=True)
        worker.start()
        worker.join(MAX_SECONDS)
        if not done:
            raise RequestError(
                "guide", expected="one that compiles quickly", found=f"more than {MAX_SECONDS:g} seconds", remedy="Simplify it."
            )
        if isinstance(done[0], BaseException):
            raise done[0]
        return done[0]

    def _compile(self, guide: Guide, end_tokens: Sequence[int]) -> GuideMatcher:
        library = _library()
        grammar = _calling(_grammar, guide, library.LLMatcher)
        limits = library.LLParserLimits(**_LIMITS)
        matcher = _calling(library.LLMatcher, self._vocabulary, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        made = GuideMatcher(matcher, self._size, [*end_tokens, self._end])
        if not made.allowed().any():
            raise RequestError("guide", expected="a text that satisfies it", found="none that this tokenizer can spell")
        return made

    def _read_vocabulary(self, library: Any) -> Any:
        if self._raw is None:
            raise RequestError(
                "guide",
                expected="an engine with a tokenizer",
                found="none",
                remedy="Leave it out, or build from a checkpoint that has one.",
            )
        # llguidance wants an end token. It gets one that no model has, so that each request can have its own, or none.
        data = json.loads(self._raw.to_str())
        self._end = 1 + max(self._raw.get_vocab(with_added_tokens=True).values(), default=-1)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data["added_tokens"].append({"id": self._end, "content": "<|the guide's end|>", "special": True, **flags})
        try:
            return _calling(library.LLTokenizer, json.dumps(data), eos_token=self._end)
        except RequestError as error:
            raise RequestError(
                "guide",
                expected="an engine with a byte-level or byte-fallback tokenizer",
                found=error.found,
                remedy="Leave it out.",
            ) from None


def _grammar(guide: Guide, matcher: Any) -> str:
    """A guide in llguidance's own format. Nothing of the guide's text can leave the place where it stands."""
    if guide.kind in ("json", "json_schema"):
        schema = guide.schema()
        options = {"whitespace_pattern": JSON_SPACE} if isinstance(schema, dict) else None  # true and false take none
        return str(matcher.grammar_from_json_schema(json.dumps(schema), defaults=options))
    if guide.kind == "regex":
        return str(matcher.grammar_from_regex(guide.text))
    lark = guide.text
    if guide.kind == "ebnf_grammar":
        from llguidance.gbnf_to_lark import any_to_lark

        lark = any_to_lark(lark)
    elif guide.kind == "choice":
        # One terminal, whose size costs little at a step; as a rule each text would cost.
        lark = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in guide.choices())
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingRuntimeError(
            "guided decoding",
            expected="llguidance installed",
            found="not installed",
            remedy='Run: pip install llguidance (the extra "guided" of ngpt-deploy)',
        ) from error
    return llguidance


def _calling(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call the library. Raises RequestError for whatever it raises."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        if isinstance(error, RequestError):
            raise
        raise _refused(str(error) or type(error).__name__) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a failed assertion inside the library, which PyO3 makes no Exception
            raise
        raise _refused("the library failed") from None


def _refused(message: str) -> RequestError:
    if message.startswith("NoExtension"):  # its word for a place where no token can follow, and the text may not end
        return RequestError("guide", expected="a text that satisfies it", found="none that this tokenizer can spell")
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return RequestError("guide", expected="one that llguidance takes", found=text[:300] + ("…" if len(text) > 300 else ""))
