"""What stands between two tags in a text that comes in pieces: reasoning, tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tags:
    """Where a part of an answer begins and ends."""

    open: str
    close: str


class Splitter:
    """Tells the text between tags from the rest, a piece at a time; the tags themselves are in neither.

    inside: whether the prompt has opened the first. once: what comes after the first closing tag is all outside.
    """

    def __init__(self, tags: Tags, *, inside: bool = False, once: bool = False) -> None:
        self._tags, self.inside, self._once = tags, inside, once
        self._held, self._closed = "", False

    def push(self, text: str) -> Iterator[tuple[bool, str, bool]]:
        """Whether it is inside, the text, and whether a closing tag came behind it; what may be the beginning of a tag is held
        back."""
        self._held += text
        while True:
            if self._once and self._closed:
                rest, self._held = self._held, ""
                if rest:
                    yield False, rest, False
                return
            tag = self._tags.close if self.inside else self._tags.open
            place = self._held.find(tag)
            if place < 0:
                keep = next(
                    (size for size in range(min(len(tag) - 1, len(self._held)), 0, -1) if self._held.endswith(tag[:size])), 0
                )
                ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                if ready:
                    yield self.inside, ready, False
                return
            if place or self.inside:
                yield self.inside, self._held[:place], self.inside
            self._held = self._held[place + len(tag) :]
            self._closed = self._closed or self.inside
            self.inside = not self.inside

    def flush(self) -> Iterator[tuple[bool, str]]:
        """What was held back, when no more comes."""
        if self._held:
            yield self.inside, self._held
        self._held = ""


def tool_call(text: str) -> dict[str, str] | None:
    """The name and the arguments, as JSON text, of a call such as {"name": "f", "arguments": {...}}; None for what is none."""
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    return {
        "name": found["name"],
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    }
