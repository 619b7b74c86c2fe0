"""Driving an engine teacher-forced through its runner, and measuring how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engines.parity.outputs import Outputs
from engines.parity.prompts import TokenSequence
from ngpt.errors import EngineError

Array = NDArray[np.float64]
TapFunction = Callable[[NDArray[np.int64]], dict[str, NDArray[np.float32]]]
"""input_ids [T] -> tap name -> float32 [T, E]; usually a second graph of the engine with these outputs."""


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
    sequences: list[TokenSequence],
    taps: TapFunction | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[Outputs]:
    """Prefill and decode every sequence, several at a time so that batches are ragged, as in service.

    Every second prompt is prefilled in two pieces: a chunked prefill must give the same logits as a whole one.
    """
    outputs: list[Outputs] = []
    for start in range(0, len(sequences), max(1, runner.num_slots)):
        group = sequences[start : start + max(1, runner.num_slots)]
        for sequence, logits in zip(group, _run_group(runner, group, start, tick), strict=True):
            seen = taps(np.asarray(sequence.tokens, dtype=np.int64)) if taps is not None else {}
            outputs.append(Outputs(logits, seen))
    return outputs


def _run_group(runner: Runner, group: list[TokenSequence], first: int, tick: Callable[[], None]) -> list[NDArray[np.float32]]:
    slots: list[int] = []
    out = [np.full((len(s.tokens), runner.vocab_size), np.nan, dtype=np.float32) for s in group]
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
    largest logits.
    ``top1``: same first choice. ``nll``: -log p of the next token in (reference, run), [T - 1]. ``angles``: tap name
    to the angle in radians between the two hidden states, [T].
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
    angles: dict[str, Array]
    finite: bool


def distance(reference: Outputs, run: Outputs, tokens: tuple[int, ...]) -> Distance:
    """Measure ``run`` against ``reference``; everything in float64."""
    a, b = np.asarray(reference.logits, np.float64), np.asarray(run.logits, np.float64)
    foreign = sorted(set(run.taps) - set(reference.taps))
    if run.taps and len(foreign) == len(run.taps):
        raise EngineError("none of the engine's taps is known", expected="embed, layers.0.mlp.update, ...", found=foreign[0])
    finite = bool(np.isfinite(b).all()) and all(bool(np.isfinite(v).all()) for v in run.taps.values())
    with np.errstate(invalid="ignore", divide="ignore"):
        log_p, log_q = _log_softmax(a), _log_softmax(b)
        kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)
        norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
        top2 = np.partition(a, -2, axis=-1)[:, -2:] if a.shape[1] > 1 else np.zeros((len(a), 2))
        following = np.asarray(tokens[1:], dtype=np.int64)[:, None]
        return Distance(
            kl=kl,
            rms=np.sqrt(np.mean((b - a) ** 2, axis=-1)),
            max_abs=np.abs(b - a).max(-1),
            cosine=(a * b).sum(-1) / (norms[0] * norms[1]),
            logit_angle=angle(a, b),
            norm_ratio=norms[1] / norms[0],
            margin=top2[:, 1] - top2[:, 0],
            top1=a.argmax(-1) == b.argmax(-1),
            nll=(
                -np.take_along_axis(log_p[:-1], following, 1)[:, 0],
                -np.take_along_axis(log_q[:-1], following, 1)[:, 0],
            ),
            angles={name: angle(reference.taps[name], run.taps[name]) for name in reference.taps if name in run.taps},
            finite=finite,
        )


def angle(a: NDArray[np.floating], b: NDArray[np.floating]) -> Array:
    """Radians between the directions of rows of a and b, accurate for tiny angles (arccos is not)."""
    x, y = (np.asarray(v, np.float64) for v in (a, b))
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, y))
        opening: Array = 2 * np.arctan2(np.linalg.norm(x - y, axis=-1), np.linalg.norm(x + y, axis=-1))
    return opening


def _log_softmax(x: Array) -> Array:
    shifted = x - x.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
