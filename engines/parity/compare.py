"""Driving an engine teacher-forced through its runner, and measuring how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.parity.prompts import TokenSequence
from engines.parity.scratch import Scratch
from engines.parity.taps import angle
from ngpt.errors import EngineError

Array = NDArray[np.float64]
_AT_ONCE = 1 << 22  # logits of a block of positions


class Runner(Protocol):
    """The part of the engine runtime's runner that the check drives."""

    vocab_size: int
    num_slots: int
    max_length: int

    def open(self) -> int:
        """Reserve a cache slot."""

    def close(self, slot: int) -> None:
        """Free it."""

    def prefill(self, slot: int, tokens: NDArray[np.int64], *, all_logits: bool = False) -> NDArray[np.float32]:
        """Append tokens [T] to the slot's cache; logits [V], or [T, V] for all."""

    def decode(self, slots: Sequence[int], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """One token per slot; logits [n, V]."""


def run_engine(
    runner: Runner,
    sequences: Sequence[TokenSequence],
    scratch: Scratch | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[NDArray[np.float32]]:
    """Prefill and decode every sequence, several at a time so that batches are ragged, as in service: logits [T, V] of each.

    Every second prompt is prefilled in two pieces: a chunked prefill must give the same logits as a whole one.
    """
    outputs: list[NDArray[np.float32]] = []
    for start in range(0, len(sequences), max(1, runner.num_slots)):
        group = sequences[start : start + max(1, runner.num_slots)]
        outputs += _run_group(runner, group, start, scratch or Scratch(), tick)
    return outputs


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


def _run_group(
    runner: Runner, group: Sequence[TokenSequence], first: int, scratch: Scratch, tick: Callable[[], None]
) -> list[NDArray[np.float32]]:
    slots: list[int] = []
    out = [scratch.array((len(s.tokens), runner.vocab_size), np.float32) for s in group]
    try:
        for index, sequence in enumerate(group):
            slots.append(runner.open())
            prompt = np.asarray(sequence.tokens[: sequence.prompt_length], dtype=np.int64)
            middle = len(prompt) // 2 if (first + index) % 2 else 0
            for begin, end in ((0, middle), (middle, len(prompt))):
                if begin < end:
                    logits = runner.prefill(slots[-1], prompt[begin:end], all_logits=True)
                    out[index][begin:end] = _shaped(logits, (end - begin, runner.vocab_size), "prefill")
            tick()
        for step in range(max(len(s.tokens) - s.prompt_length for s in group)):
            active = [i for i, s in enumerate(group) if s.prompt_length + step < len(s.tokens)]
            tokens = np.asarray([group[i].tokens[group[i].prompt_length + step] for i in active], dtype=np.int64)
            logits = runner.decode([slots[i] for i in active], tokens)
            for i, row in zip(active, _shaped(logits, (len(active), runner.vocab_size), "decode"), strict=True):
                out[i][group[i].prompt_length + step] = row
            tick()
    finally:
        for slot in slots:
            runner.close(slot)
    return out


def _shaped(logits: NDArray[np.float32], shape: tuple[int, int], where: str) -> NDArray[np.float32]:
    if logits.shape != shape:
        raise EngineError(f"logits of {where}", expected=str(list(shape)), found=str(list(logits.shape)))
    return logits


@dataclass(frozen=True)
class Distance:
    """How far a run is from a reference, per position [T] of one sequence.

    ``kl``: KL(reference || run) in nats. ``rms`` and ``max_abs``: of the logit difference. ``cosine``,
    ``logit_angle`` (radians) and ``norm_ratio``: of the logit vectors. ``margin``: the reference's gap between its two
    largest logits. ``top1``: same first choice. ``nll``: -log p of the next token in (reference, run), [T - 1].
    ``angles``: tap name to how far its values are apart (`engines.parity.taps.tap_distance`), [T]. ``finite``: of the run.
    """

    kl: Array
    rms: Array
    max_abs: Array
    cosine: Array
    logit_angle: Array
    norm_ratio: Array
    margin: Array
    top1: NDArray[np.bool_]
    nll: tuple[Array, Array]
    angles: Mapping[str, Array]
    finite: bool


def distance(
    reference: NDArray[np.floating],
    run: NDArray[np.floating],
    tokens: Sequence[int],
    angles: Mapping[str, Array] | None = None,
) -> Distance:
    """Measure the logits [T, V] of a run against those of a reference, in float64, a block of positions at a time."""
    step = max(1, _AT_ONCE // reference.shape[1])
    starts = range(0, len(reference), step)
    following = np.asarray([*tokens[1:], 0], dtype=np.int64)[:, None]
    parts = [_measures(reference[at : at + step], run[at : at + step], following[at : at + step]) for at in starts]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    before, after = (found.pop(name)[:-1] for name in ("before", "after"))
    taps = dict(angles or {})
    finite = bool(found.pop("finite").all()) and all(bool(np.isfinite(values).all()) for values in taps.values())
    return Distance(**found, nll=(before, after), angles=taps, finite=finite)


def _measures(
    reference: NDArray[np.floating], run: NDArray[np.floating], following: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    a, b = np.asarray(reference, np.float64), np.asarray(run, np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
        top2 = np.partition(a, -2, axis=-1)[:, -2:] if a.shape[1] > 1 else np.zeros((len(a), 2))
        error = np.abs(b - a)
        return {
            "kl": np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0),
            "rms": np.sqrt(np.mean(error**2, axis=-1)),
            "max_abs": error.max(-1),
            "cosine": (a * b).sum(-1) / (norms[0] * norms[1]),
            "logit_angle": angle(a, b),
            "norm_ratio": norms[1] / norms[0],
            "margin": top2[:, 1] - top2[:, 0],
            "top1": a.argmax(-1) == b.argmax(-1),
            "before": -np.take_along_axis(log_p, following, 1)[:, 0],
            "after": -np.take_along_axis(log_q, following, 1)[:, 0],
            "finite": np.isfinite(b).all(-1),
        }


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
