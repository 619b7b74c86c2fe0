"""Given sequences once more, with every number kept: what the script in a failed report runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines.parity.compare import Distance, distance
from engines.parity.driving import run_engine
from engines.parity.opening import opened
from engines.parity.prompts import TokenSequence
from engines.parity.quantized import quantization_of
from engines.parity.reference import run_reference
from engines.parity.verify import FLOAT64_LIMIT_BYTES, NOISE, Angles, plan_of, tapped
from ngpt.checkpoint import Checkpoint, open_checkpoint
from ngpt.progress import Progress, part_of, silent


@dataclass(frozen=True)
class Replay:
    """One sequence: how far the engine, and PyTorch in the engine's precision, are from the wide reference at each position."""

    sequence: TokenSequence
    engine: Distance
    noise: Distance


def replay(
    engine: Any,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    sequences: Sequence[TokenSequence],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Replay]:
    """Run an engine and the reference on these sequences as `verify` does, and return all distances instead of a verdict.

    Args:
        engine: a folder, a loaded engine or a bare runner.
        checkpoint: what the engine was built from.
        sequences: as they stand in a report (``tokens``, ``prompt_length``). How a prompt is read, and which rows of the
            cache it gets, depends on its place: a fault of those needs the sequences before it as well.
        seed: that of the verdict.
        progress: called with what is being done and the part that is done.

    Returns:
        One `Replay` a sequence. ``engine.angles`` and ``noise.angles`` have a value per position [T] for every tap.

    Raises:
        As `verify` does.
    """
    given = list(sequences)
    with contextlib.ExitStack() as held:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = held.enter_context(open_checkpoint(checkpoint))
        source = held.enter_context(opened(engine, checkpoint, part_of(progress, 0.0, 0.1)))
        logits = run_engine(source.runner, given, source.scratch)
        source.release()
        seen = tapped(source.taps(), given, source.scratch)
        precision = source.precision
        plan = plan_of(checkpoint, precision.arithmetic, quantization_of(precision), FLOAT64_LIMIT_BYTES, seed)
        angles = Angles(plan.reference, seen)
        outputs = run_reference(
            checkpoint,
            [sequence.tokens for sequence in given],
            [variant for variant in plan.variants if variant.name in (plan.reference, NOISE)],
            scratch=source.scratch,
            on_taps=angles,
            progress=part_of(progress, 0.2, 1.0),
        )
        reference, noise = outputs[plan.reference], outputs[NOISE]
        return [
            Replay(
                sequence,
                distance(reference[i], logits[i], sequence.tokens, angles.engine[i]),
                distance(reference[i], noise[i], sequence.tokens, angles.noise[i]),
            )
            for i, sequence in enumerate(given)
        ]
