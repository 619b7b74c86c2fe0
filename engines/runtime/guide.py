"""What a request's answer must look like: a schema, a regular expression, a grammar, or a list of texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import RequestError

KINDS = ("json", "json_schema", "regex", "ebnf_grammar", "lark_grammar", "choice")
MAX_GUIDE_BYTES = 64 << 10
"""Longer texts are refused: what a step costs grows with them."""
MAX_MERGED = 8
"""The most patterns that one text may have to match at once. Their product is built, in time that grows exponentially."""
_MAX_VISITS = 200_000
_PATTERNS = ("pattern", "format", "patternProperties")
_MERGERS = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "not")


@dataclass(frozen=True)
class Guide:
    """What an answer must be.

    Args:
        kind: "json" (any JSON object), "json_schema", "regex" (of the whole answer; Rust's syntax, without look-around; its
            digits are those of every script), "ebnf_grammar" (GBNF, as llama.cpp's, or Lark), "lark_grammar" (llguidance's Lark),
            or "choice" (one of some texts).
        text: the schema, the expression, the grammar, or for "choice" a JSON list of texts. Not read for "json".

    Raises:
        RequestError: an unknown kind, a text that is empty, no UTF-8 or longer than 64 KiB, JSON that cannot be read. What else
            is wrong with a grammar is found when a request with it is submitted.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError("guide", expected=f"a kind out of {', '.join(KINDS)}", found=repr(self.kind)[:200])
        if self.kind == "json":
            object.__setattr__(self, "text", "")
            return
        if not isinstance(self.text, str) or not self.text:
            raise RequestError("guide", expected=f"a text for {self.kind}", found=repr(self.text)[:200])
        try:
            size = len(self.text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise RequestError("guide", expected="valid UTF-8", found=str(error)) from None
        if size > MAX_GUIDE_BYTES:
            raise RequestError("guide", expected=f"at most {MAX_GUIDE_BYTES} bytes", found=f"{size} bytes", remedy="Shorten it.")
        if self.kind == "json_schema":
            check_schema(self.schema())
        elif self.kind == "choice":
            self.choices()
        elif self.kind != "regex" and self.text.count("&") > MAX_MERGED:  # `&` is how Lark spells that both must match
            raise RequestError(
                "guide",
                expected=f'at most {MAX_MERGED} signs "&"',
                found=str(self.text.count("&")),
                remedy="Simplify the grammar.",
            )

    def schema(self) -> Any:
        """The schema of "json" and "json_schema": a dictionary or a boolean. Raises RequestError."""
        schema = {"type": "object"} if self.kind == "json" else self._json()
        if not isinstance(schema, dict | bool):
            raise RequestError("guide", expected="a JSON schema: an object", found=repr(schema)[:200])
        return schema

    def choices(self) -> list[str]:
        """The texts of "choice". Raises RequestError."""
        texts = self._json()
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise RequestError("guide", expected="a JSON list of texts that are not empty", found=self.text[:200])
        return texts

    def _json(self) -> Any:
        try:
            value = json.loads(self.text)
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # \ud800 alone is JSON and no text
        except (ValueError, RecursionError) as error:
            raise RequestError("guide", expected=f"JSON for {self.kind}", found=str(error)[:200]) from None
        return value


def check_schema(schema: Any) -> None:
    """Raise RequestError for a schema that makes one text match more than MAX_MERGED patterns at once.

    A simple upper bound: the patterns below a place that merges schemas, what it refers to included.
    """
    visits = 0

    def below(top: Any) -> Iterator[dict[str, Any]]:
        nonlocal visits
        seen, waiting = set(), [top]
        while waiting:
            node = waiting.pop()
            visits += 1
            if visits > _MAX_VISITS:
                raise RequestError("guide", expected="a simpler schema", found="too many schemas that are merged")
            if isinstance(node, list):
                waiting += node
            elif isinstance(node, dict):
                yield node
                waiting += node.values()
                reference = node.get("$ref")
                if isinstance(reference, str) and reference not in seen:
                    seen.add(reference)
                    waiting.append(_resolved(schema, reference))

    if sum(map(_patterns, below(schema))) <= MAX_MERGED:
        return
    for node in below(schema):
        if "allOf" in node or sum(key in node for key in (*_PATTERNS, *_MERGERS)) > 1:
            found = 0
            for other in below(node):
                found += _patterns(other)
                if found > MAX_MERGED:
                    raise RequestError(
                        "guide",
                        expected=f"at most {MAX_MERGED} patterns and formats below a schema that merges others (allOf, $ref)",
                        found="more",
                        remedy="Write one pattern instead.",
                    )


def _patterns(node: dict[str, Any]) -> int:
    several = node.get("patternProperties")
    return sum(isinstance(node.get(key), str) for key in ("pattern", "format")) + (
        len(several) if isinstance(several, dict) else 0
    )


def _resolved(schema: Any, reference: str) -> Any:
    """What a reference into the same schema points at; None for any other, which the library refuses."""
    if not reference.startswith("#"):
        return None
    at = schema
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(at, dict):
            at = at.get(name)
        elif isinstance(at, list) and name.isdecimal() and int(name) < len(at):
            at = at[int(name)]
        else:
            return None
    return at
