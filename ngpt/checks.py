"""What a value from outside is, before anything is computed with it."""

from __future__ import annotations

import math
from typing import TypeGuard


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float64 can hold; a bool is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond float64
        return False


def is_one(value: object) -> bool:
    """Whether it is the number 1; true is none."""
    return is_finite(value) and value == 1


def whole(value: object) -> object:
    """128.0, as some tools write a whole number, as 128; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
