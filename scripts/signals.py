"""Signals that ask a command to stop: whatever cleans up after Ctrl-C cleans up after these."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

PATIENCE = 10.0  # seconds in which a second SIGTERM changes nothing
_AGAIN = 0.02  # seconds until it is looked again whether an import is over


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP."""


class Stopping:
    """Raises KeyboardInterrupt for SIGINT and Terminated for SIGTERM and SIGHUP; ``number`` is the last signal that did.

    Not while a module is being imported: the libraries' compiled parts turn an exception there into another error, or abort
    the process. It is raised as soon as the import is over.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._cleaning_since = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if _importing(frame):
            self._later(number)
            return
        if number == signal.SIGINT:
            self.number = number
            raise KeyboardInterrupt
        if time.monotonic() - self._cleaning_since > PATIENCE:  # cleaning up is not interrupted by the same request
            self.number, self._cleaning_since = number, time.monotonic()
            raise Terminated

    def not_lost(self, what: Any) -> bool:
        """Whether this exception that Python let nobody catch was a request, which is then made again.

        One that comes in a callback of Python's own (a finaliser, a weak reference) is printed and forgotten.
        """
        if not isinstance(what.exc_value, KeyboardInterrupt) or self.number is None:
            return False
        self._cleaning_since = -math.inf
        self._later(self.number)
        return True

    def _later(self, number: int) -> None:
        signal.signal(signal.SIGALRM, lambda _, frame: self(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """The handlers in place, and put back at the end. A signal that is ignored (nohup) stays so, and only the main thread
    may ask."""
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    state, before = Stopping(), dict[int, Any]()
    for number, default in usual.items():
        with contextlib.suppress(ValueError):
            if signal.getsignal(number) == default:
                before[number] = signal.signal(number, state)
    usually = sys.unraisablehook
    sys.unraisablehook = lambda what: None if state.not_lost(what) else usually(what)
    try:
        yield state
    finally:
        sys.unraisablehook = usually
        if before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
