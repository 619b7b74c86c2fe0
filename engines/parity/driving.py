"""Driving an engine through its runner as a server does, teacher-forced, and keeping every logit.

What the scheduler does to an engine is done here too, because a fault may show nowhere else: sequences begin and end while
others go on, a row that one has left is another's next, a row takes the place of one that ended, a step asks for some rows
of a block and in another order, prompts come in pieces, and of a prompt the last token's logits alone are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.parity.prompts import TokenSequence
from engines.parity.scratch import Scratch
from ngpt.errors import EngineError

Logits = NDArray[np.float32]
_STAGGER = 2  # decode steps between the beginnings of two sequences: they end apart, and rows move while others go on
_IDLE_EVERY = 3  # of so many steps, one leaves a row out


class Runner(Protocol):
    """The part of the engine runtime's runner that the check drives."""

    vocab_size: int
    num_slots: int
    max_length: int

    def open(self) -> int:
        """Reserve a cache slot."""

    def close(self, slot: int) -> None:
        """Free it."""

    def prefill(self, slot: int, tokens: NDArray[np.int64], *, all_logits: bool = False) -> Logits:
        """Append tokens [T] to the slot's cache; logits [V], or [T, V] for all."""

    def decode(self, slots: Sequence[int], tokens: NDArray[np.int64]) -> Logits:
        """One token per slot; logits [n, V]."""


@dataclass
class _Active:
    """A sequence in a slot: `at` is its next token."""

    index: int
    slot: int
    at: int


def run_engine(
    runner: Runner,
    sequences: Sequence[TokenSequence],
    scratch: Scratch | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[Logits]:
    """Read and decode every sequence, as many at a time as there are slots: logits [T, V] of each.

    A prompt is read twice. Once for the logits of all its tokens, in a slot that is then given back; and once, in a slot that was
    given back, as it is read in service, for those of its last token alone, from which the sequence goes on. Every second prompt
    is in two pieces the first time, the others are the second time. `tick` is called for each prompt and each decoded token.
    Raises EngineError for logits of another shape.
    """
    place = scratch or Scratch()
    out = [place.array((len(s.tokens), runner.vocab_size), np.float32) for s in sequences]
    waiting, active, step = list(range(len(sequences))), list[_Active](), 0
    try:
        while waiting or active:
            if waiting and len(active) < max(1, runner.num_slots) and (not active or step % _STAGGER == 0):
                _read(runner, sequences, waiting.pop(0), active, out)
                tick()
            for _ in range(_decode(runner, sequences, _asked(active, step), out)):
                tick()
            step += 1
            for ended in [each for each in active if each.at == len(sequences[each.index].tokens)]:
                active.remove(ended)
                runner.close(ended.slot)
    finally:
        for each in active:
            runner.close(each.slot)
    return out


def continue_greedily(runner: Runner, prompt: Sequence[int], steps: int) -> list[int]:
    """The runner's own next ``steps`` tokens after a prompt; an end-of-sequence token does not stop it."""
    slot, found = runner.open(), []
    try:
        logits = runner.prefill(slot, np.asarray(prompt, dtype=np.int64))
        for step in range(steps):
            found.append(int(np.argmax(logits)))
            if step + 1 < steps:
                logits = runner.decode([slot], np.asarray(found[-1:], dtype=np.int64))[0]
    finally:
        runner.close(slot)
    return found


def _read(runner: Runner, sequences: Sequence[TokenSequence], index: int, active: list[_Active], out: Sequence[Logits]) -> None:
    """Read a prompt, twice; it is active afterwards."""
    length = sequences[index].prompt_length
    prompt = np.asarray(sequences[index].tokens[:length], dtype=np.int64)
    slot = runner.open()
    try:
        for begin, end in _pieces(length, in_two=index % 2 == 1):
            logits = runner.prefill(slot, prompt[begin:end], all_logits=True)
            out[index][begin:end] = _shaped(logits, (end - begin, runner.vocab_size), "prefill")
    finally:
        runner.close(slot)
    active.append(_Active(index, runner.open(), length))
    for begin, end in _pieces(length, in_two=index % 2 == 0):
        last = runner.prefill(active[-1].slot, prompt[begin:end])
        out[index][end - 1] = _shaped(last, (runner.vocab_size,), "prefill")


def _pieces(length: int, *, in_two: bool) -> list[tuple[int, int]]:
    middle = length // 2 if in_two else 0
    return [(begin, end) for begin, end in ((0, middle), (middle, length)) if begin < end]


def _asked(active: list[_Active], step: int) -> list[_Active]:
    """Those that a step decodes: some steps leave out one in the middle, and every second asks in the other order."""
    asked = list(active)
    if step % _IDLE_EVERY == _IDLE_EVERY - 1 and len(asked) > 2:
        del asked[len(asked) // 2]
    return asked[::-1] if step % 2 else asked


def _decode(runner: Runner, sequences: Sequence[TokenSequence], asked: list[_Active], out: Sequence[Logits]) -> int:
    """One token of each; a sequence that has none left (a prompt alone) is not asked for. Returns how many were."""
    asked = [each for each in asked if each.at < len(sequences[each.index].tokens)]
    if not asked:
        return 0
    tokens = np.asarray([sequences[each.index].tokens[each.at] for each in asked], dtype=np.int64)
    logits = _shaped(runner.decode([each.slot for each in asked], tokens), (len(asked), runner.vocab_size), "decode")
    for each, row in zip(asked, logits, strict=True):
        out[each.index][each.at] = row
        each.at += 1
    return len(asked)


def _shaped(logits: Logits, shape: tuple[int, ...], where: str) -> Logits:
    if logits.shape != shape:
        raise EngineError(f"logits of {where}", expected=str(list(shape)), found=str(list(logits.shape)))
    return logits
