"""What the commands' options have in common: their help, their numbers, and the bar that shows progress."""

import argparse
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from scripts.terminal import plain

MOST = (1 << 31) - 1
"""Counts above this are refused: no runtime takes them."""
Run = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Complains about an argument in one line that no terminal can be steered with."""

    def error(self, message: str) -> NoReturn:
        super().error(plain(message, 500))

    def _print_message(self, message: str, file: Any = None) -> None:
        # The base class keeps silent where its help cannot be written.
        if message and file is not None:
            file.write(message)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """With defaults, and with names such as onnx-portable kept in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Command(Protocol):
    """Adds a command: its name, what runs it, and the sentence that describes it."""

    def __call__(self, name: str, run: Run, help: str) -> argparse.ArgumentParser:
        """The parser of the command."""


def add_text(command: argparse.ArgumentParser) -> None:
    """The options on the tokenizer and the tokens that end a text."""
    command.add_argument(
        "--tokenizer",
        metavar="DIR_OR_FILE",
        help="tokenizer to take in place of the one beside it: a folder, or a tokenizer.json",
    )
    command.add_argument(
        "--eos",
        action="append",
        default=[],
        metavar="TOKEN",
        help="token that ends a text, an id or the tokenizer's text of it, in "
        "place of those that the files name; may be given several times",
    )


def positive(text: str) -> int:
    """A count of at least 1."""
    return _within(text, 1, MOST)


def port(text: str) -> int:
    """A TCP port; 0 is any that is free."""
    return _within(text, 0, 65535)


def gpu_numbers(text: str) -> tuple[int, ...]:
    """Numbers of GPUs with commas between them."""
    return tuple(_within(number, 0, 1 << 10) for number in text.split(","))


def _within(text: str, low: int, high: int) -> int:
    value = int(text)
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be from {low} to {high}, found {text[:40]}")
    return value


class Bar:
    """A progress bar on standard error that says what is being done; nothing where that is no terminal."""

    def __init__(self) -> None:
        from tqdm import tqdm

        layout = "{percentage:3.0f}%|{bar:30}| {remaining} left, {desc}"
        shown = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(total=1.0, bar_format=layout, disable=None if shown else True)

    def __call__(self, what: str, done: float) -> None:
        self._bar.set_description_str(plain(what, 100), refresh=False)
        self._bar.update(max(0.0, done - self._bar.n))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
