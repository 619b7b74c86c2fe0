"""What the commands say to a terminal, and how they end: one line for an error, whatever it was."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator

from ngpt import errors

NAME = "ngpt-deploy"
_MAX_LINE = 2000  # characters of an error
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
    "llguidance": "guided",
    "securesystemslib": "sign",
    "cryptography": "sign",
}
_EXTRAS |= {"tritonclient": "serve", "google": "serve", "grpc": "serve", "pytriton": "serve"}
_EXTRAS |= dict.fromkeys(("jinja2", "pydantic", "fastapi", "starlette", "uvicorn", "prometheus_client"), "openai")
_CODES: dict[type[BaseException], int] = {errors.ParityFailedError: 3, errors.RegressionError: 4}
_ALWAYS = ("numpy", "tokenizers", "tqdm")  # what every installation has, unless somebody took it away


def plain(text: object, limit: int = _MAX_LINE) -> str:
    """A text in one line that no terminal can be steered with.

    Characters that do not print (control and escape characters, line ends, marks that turn the direction of writing) are
    spelled out, and of a text longer than `limit` characters the middle is left out.
    """
    return errors.plain(str(text), limit).replace("\n", "\\n")


def harmless(text: str) -> str:
    """A model's text for a terminal: all of it but control characters, of which only line ends and tabs are kept."""
    return "".join(letter for letter in text if letter in "\n\t" or not (ord(letter) < 32 or 127 <= ord(letter) < 160))


def say(command: str, text: object) -> None:
    """One line on standard error, if there is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"{f'{NAME} {command}'.rstrip()}: {plain(text)}", file=sys.stderr, flush=True)


def stopped(command: str, number: int) -> int:
    """Say that a signal ended the command; returns the exit code."""
    say(command, f"stopped by {signal.Signals(number).name}")
    return 128 + number


def fail(command: str, error: BaseException) -> int:
    """Say in one line what went wrong and what to do; returns the exit code. Notes of the error (a server's log) follow it."""
    code = 2
    if isinstance(error, errors.NGPTDeployError) or _is_serving_error(error):
        text, code = str(error), _CODES.get(type(error), 2)
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


def _is_serving_error(error: BaseException) -> bool:
    """Nothing is imported to tell: a signal may have stopped an import halfway, and who raised one has its module loaded."""
    loaded = sys.modules.get("engines.runtime.errors")
    return loaded is not None and isinstance(error, loaded.ServingError)


def _open_closed_streams() -> None:
    """Streams that the caller closed lead nowhere from now on.

    For a standard error that is None `print` and argparse take standard output, and the next file that is opened would get
    the number of the closed one, to which libraries in C go on writing their notes.
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
    """Warnings and notes in one line, put back at the end; and text that any terminal's encoding can take."""
    _open_closed_streams()
    notes, log = _Notes(), logging.getLogger("ngpt")
    level = log.level
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say("", f"warning: {message}")  # type: ignore[assignment]
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            log.removeHandler(notes)
            log.setLevel(level)
