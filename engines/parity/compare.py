"""How far two outputs are apart."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.parity.taps import angle

Array = NDArray[np.float64]
_AT_ONCE = 1 << 22  # logits of a block of positions


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

    def measure(at: int) -> dict[str, NDArray[Any]]:
        return _measures(reference[at : at + step], run[at : at + step], following[at : at + step])

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        parts = list(pool.map(measure, starts))
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
