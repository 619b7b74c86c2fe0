"""JSON from files that nobody vouches for, read without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ngpt.errors import CorruptFileError, UnexpectedTensorError

MAX_JSON_BYTES = 16 << 20
MAX_CONFIG_BYTES = 4 << 20


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Strict JSON: bounded size, UTF-8 (a byte-order mark is passed over), no duplicate keys, no NaN, no number beyond float64.

    Raises `CorruptFileError`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"cannot read {path}", found=getattr(error, "strerror", None) or str(error)) from error
    if len(data) > limit:
        raise CorruptFileError(f"{path} is too large", expected=f"at most {limit} bytes", found="more")
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> Any:
    """Strict JSON from bytes; ``where`` names the source in errors."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise UnexpectedTensorError(f"{where} holds the key {key[:200]!r} twice", expected="each key once")
            seen[key] = value
        return seen

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is not a JSON number")

    def number(text: str) -> float:
        if math.isinf(value := float(text)):
            raise ValueError(f"{text[:40]} is beyond the numbers of float64")
        return value

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where} is not valid JSON", found=str(error)[:200]) from error
