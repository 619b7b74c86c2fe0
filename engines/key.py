"""The key over what an engine is made of (`engines.identity`), and what differs between two engines. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ngpt.errors import shown


def key_of(parts: Mapping[str, Any]) -> str:
    """64 hex digits over all parts."""
    return hashlib.sha256(canonical(parts)).hexdigest()


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What differs, one line a value: "libraries.numpy: here 2.0.0, there 1.26.4"."""
    ours, theirs = dict(_flat("", here)), dict(_flat("", there))
    return [
        f"{name}: here {_shown(ours.get(name))}, there {_shown(theirs.get(name))}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]


def canonical(value: object) -> bytes:
    """JSON of one spelling; what JSON does not have is spelled as Python prints it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def _flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    else:
        yield prefix, value


def _shown(value: object) -> str:
    return "nothing" if value is None else str(value) if isinstance(value, str) and len(value) <= 80 else shown(value)
