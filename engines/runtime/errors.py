"""Errors of the serving runtime.

    ServingError
    ├── RequestError (also ValueError)        one request is wrong; other requests are not affected
    ├── EngineFileError                       the engine folder or its manifest is bad
    ├── CapacityError                         no slot, or a full queue
    ├── ClosedError                           the scheduler or the engine was stopped
    ├── Cancelled                             the request was cancelled by its owner
    ├── RunnerError                           the model runner failed while it worked on the request
    └── MissingRuntimeError (also ImportError) the library that runs the engine is not installed

This package imports nothing outside itself but NumPy and tokenizers, so that it can be copied into a model
repository; that is why it has its own root.
"""

from __future__ import annotations

MAX_TEXT = 4000  # characters of one part of an error


class ServingError(Exception):
    """Root of the errors of this package: what is wrong, what was expected, what was found, what to do.

    Each part can be shown as it is, whatever name or text from outside stands in it: control characters and lone surrogates are
    escaped, and of a long one the middle is left out.
    """

    def __init__(self, what: str, *, expected: str = "", found: str = "", remedy: str = "") -> None:
        self.what, self.expected, self.found, self.remedy = map(_plain, (what, expected, found, remedy))
        super().__init__(self.what)

    def __str__(self) -> str:
        details = [f"expected {self.expected}"] if self.expected else []
        if self.found:
            details.append(f"found {self.found}")
        text = f"{self.what}: {', '.join(details)}" if details else self.what
        return f"{text}. {self.remedy}" if self.remedy else text


def _plain(text: str) -> str:
    if len(text) > MAX_TEXT:
        text = f"{text[: MAX_TEXT // 2]} ... {text[-MAX_TEXT // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


class RequestError(ServingError, ValueError):
    """A request that cannot be served as it is."""


class EngineFileError(ServingError):
    """An engine folder that is missing, damaged, or not what its manifest says."""


class CapacityError(ServingError):
    """There is no room for the request now."""


class ClosedError(ServingError):
    """The scheduler was stopped, or the engine closed."""


class Cancelled(ServingError):
    """The request was cancelled before it finished."""


class RunnerError(ServingError):
    """The runner raised, or returned logits that cannot be used; `__cause__` holds its own error."""


class MissingRuntimeError(ServingError, ImportError):
    """The library that runs this engine is not installed."""
