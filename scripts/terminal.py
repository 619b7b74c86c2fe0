"""What the commands say to a terminal, and how they end: one line for an error, whatever it was; clean-up on a signal."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ngpt import errors

NAME = "ngpt-deploy"
_MAX_LINE = 2000  # characters of an error
_PATIENCE = 10.0  # seconds in which a second SIGTERM changes nothing
_MAX_NOTES = 60  # lines of a log shown below an error
# Modules whose absence an extra mends. They are imported where they are needed, so any command may meet one that is missing.
_EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "safetensors": "torch",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "ml_dtypes": "onnx",
    "onnxruntime": "onnx",
}
_EXTRAS |= {"tritonclient": "serve", "google": "serve", "grpc": "serve", "pytriton": "serve"}
_ALWAYS = ("numpy", "tokenizers", "tqdm")  # what every installation has, unless somebody took it away


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: whatever cleans up after Ctrl-C cleans up after these."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def plain(text: object, limit: int = _MAX_LINE) -> str:
    """A text in one line that no terminal can be steered with.

    Characters that do not print (control and escape characters, line ends, marks that turn the direction of writing) are spelled out, and
    of a text longer than `limit` characters the middle is left out.
    """
    return errors.plain(str(text), limit).replace("\n", "\\n")


def harmless(text: str) -> str:
    """A model's text for a terminal: all of it but control characters, of which only line ends and tabs are kept."""
    return "".join(letter for letter in text if letter in "\n\t" or not (ord(letter) < 32 or 127 <= ord(letter) < 160))


def say(command: str, text: object) -> None:
    """One line on standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"{f'{NAME} {command}'.rstrip()}: {plain(text)}", file=sys.stderr, flush=True)


def fail(command: str, error: BaseException) -> int:
    """Say in one line what went wrong and what to do; returns the exit code. Notes of the error (a server's log) follow it."""
    # Loaded if one of its errors was raised. Loading it here could fail: for want of numpy, or where a signal has just stopped that.
    runtime = sys.modules.get("engines.runtime.errors")
    typed = (errors.NGPTDeployError,) if runtime is None else (errors.NGPTDeployError, runtime.ServingError)
    code = 2
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Terminated) else signal.SIGINT
        text, code = f"stopped by {signal.Signals(number).name}", 128 + number
    elif isinstance(error, typed):
        text, code = str(error), 3 if isinstance(error, errors.ParityFailedError) else 2
    elif isinstance(error, BrokenPipeError):
        text = "nobody reads the output any more. Read it to its end, or write it to a file"
    elif isinstance(error, OSError):
        found, remedy = errors.os_trouble(error)
        text = f"{found}. {remedy[0].upper()}{remedy[1:]}"
    elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # as torch puts it, in a RuntimeError
        text = "there is not enough memory. Close other programs, or use a machine with more"
    elif isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get(str(error.name).split(".")[0])):
        text = str(errors.missing_package(f"this needs the package {error.name}", extra))
    elif isinstance(error, ModuleNotFoundError) and error.name in _ALWAYS:
        text = f"this needs the package {error.name}. pip install {error.name}"
    else:
        # What ends here is our fault or a library's: the commands' own errors are typed.
        text = f"{type(error).__name__}: {error}. Run it again with --debug and report what that prints"
    say(command, text)
    for line in [line for note in getattr(error, "__notes__", ()) for line in str(note).splitlines()][:_MAX_NOTES]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(f"  {plain(line, 300)}", file=sys.stderr)
    return code


def _open_closed_streams() -> None:
    """Streams that the caller closed lead nowhere from now on.

    For a standard error that is None `print` and argparse take standard output, and the next file that is opened would get the number of
    the closed one, to which libraries in C go on writing their notes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def finish_output() -> None:
    """Write out what was printed. Raises OSError where it cannot be written (a closed pipe, a full disk), and then forgets it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        # Python would try once more at its end, and complain in its own words.
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        raise


class _Notes(logging.Handler):
    """What the packages log, in lines like those of errors."""

    def emit(self, record: logging.LogRecord) -> None:
        say("", f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Signals that clean up, and warnings and notes in one line, all put back at the end; and text that any terminal's encoding can take."""
    _open_closed_streams()
    before: dict[int, Any] = {}
    asked = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        now = time.monotonic()
        if now - asked > _PATIENCE:  # cleaning up is not interrupted by the same request
            asked = now
            raise Terminated(number)

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        # One that is ignored (nohup) stays so. Only the main thread may ask.
        with contextlib.suppress(ValueError):
            if number not in before and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    unraisable = sys.unraisablehook

    def ask_again(lost: Any) -> None:
        """A request that came while Python ran a callback of its own, which lets no exception out, would be lost."""
        nonlocal asked
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            unraisable(lost)
            return
        asked = -math.inf
        number = lost.exc_value.number if isinstance(lost.exc_value, Terminated) else signal.SIGINT
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))  # not here: nothing gets out of this function either
        again.daemon = True
        again.start()

    sys.unraisablehook = ask_again
    notes, log = _Notes(), logging.getLogger("ngpt")
    log.addHandler(notes)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say("", f"warning: {message}")  # type: ignore[assignment]
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            log.removeHandler(notes)
            sys.unraisablehook = unraisable
            for number, handler in before.items():
                signal.signal(number, handler)
