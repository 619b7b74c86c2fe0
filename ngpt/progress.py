"""How long work says where it is: one signature for every callback of the project."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called as progress(what is being done, part of all that is done): the part rises from 0 to 1."""


def silent(what: str, done: float) -> None:
    """For callers who do not want to know."""


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """The progress of one step of a larger work, which takes it from `start` to `end`."""
    return lambda what, done: progress(what, start * (1 - done) + end * done)
