"""`verify`: the whole parity check of one engine against the PyTorch model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends import StoredRows, TapFunction
from engines.parity.compare import Array, Distance, distance
from engines.parity.driving import Runner, continue_greedily, run_engine
from engines.parity.gate import Loss, Measured
from engines.parity.invariants import invariants_of
from engines.parity.opening import opened
from engines.parity.prompts import TokenSequence, make_sequences, parameters, text_windows
from engines.parity.quantized import Quantization, WeightAudit, quantization_of, round_to_int8
from engines.parity.reference import Taps, Variant, run_reference
from engines.parity.report import ParityReport
from engines.parity.scratch import Scratch
from engines.parity.summary import Comparison, report_of
from engines.parity.taps import tap_distance
from engines.parity.weights import PerturbedWeights, QuantizedWeights, folded_factors
from engines.runtimes import precision_of
from export.precision import Precision
from ngpt.checkpoint import Checkpoint, open_checkpoint
from ngpt.errors import EngineError
from ngpt.progress import Progress, part_of, silent

FLOAT64_LIMIT_BYTES = 8 << 30
ORIGINAL, QUANTIZED, NOISE, PERTURBED = "original", "quantised", "noise", "perturbed"


def verify(
    engine: Any,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    prompts: Sequence[str | Sequence[int]] | None = None,
    decode_steps: int | None = None,
    text: str | None = None,
    seed: int = 0,
    precision: Precision | str | None = None,
    runtime: str | None = None,
    quantization: Quantization | None = None,
    taps: TapFunction | None = None,
    stored: StoredRows | None = None,
    float64_limit_bytes: int = FLOAT64_LIMIT_BYTES,
    name: str | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an engine with `NGPTForCausalLM` of the same checkpoint, both fed the same tokens.

    The engine runs first and is released where it was opened here; the reference follows, a layer at a time. What of both is
    large lies in files beside the engine meanwhile.

    Args:
        engine: a folder, whose files are held against its manifest first, a loaded engine, or a bare runner.
        checkpoint: the folder or file that the engine was built from, or it opened. A folder's manifest says which it must be.
        prompts: texts, or lists of token ids, which the engine continues greedily. Unless given: random tokens, and text where
            the checkpoint has a tokenizer.
        decode_steps: tokens decoded after each prompt; unless given 64, 32 from a billion parameters on, and at most half the
            model's length.
        text: compared as well, in windows; the summary then has the perplexity of engine and reference over it.
        seed: of the random tokens.
        precision: what the engine computes in and stores, itself or by its name in ``runtime``. Unless given: what the
            manifest says, else float32 everywhere.
        runtime: the runtime in whose words ``precision`` is; what the manifest says, else "onnxruntime".
        quantization: another idea of the engine's weights than ``precision`` gives.
        taps: gives values inside the engine for the check layer by layer: token ids [T] to name -> float32 [T, n]. A folder's
            engine is tapped in its own graph unless given.
        stored: gives the quantised matrices of the engine's own file; a folder's are looked up unless given.
        float64_limit_bytes: the reference is float64 where the model fits in so many bytes, else float32; the report says which.
        name: heads the report; the manifest's unless given.
        progress: called with what is being done and the part that is done.

    Returns:
        The report. Numbers that disagree are no exception: they are the verdict "fail".

    Raises:
        EngineError: the engine misbehaves, or was built from another checkpoint.
        EngineFileError, RunnerError: a folder's file is not what its manifest says, or it cannot be run here.
        CheckpointError, ConfigError: bad input.
    """
    with contextlib.ExitStack() as held:
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = held.enter_context(open_checkpoint(checkpoint))
        source = held.enter_context(opened(engine, checkpoint, part_of(progress, 0.0, 0.1)))
        _check_sizes(source.runner, checkpoint)
        if isinstance(precision, str):
            precision = precision_of(runtime or source.runtime, precision)
        precision = precision or source.precision
        sequences = make_sequences(
            checkpoint,
            prompts,
            max_length=min(source.runner.max_length, checkpoint.spec.max_length),
            decode_steps=decode_steps,
            seed=seed,
            continue_greedily=partial(continue_greedily, source.runner),
        )
        if text is not None:
            length = min(source.runner.max_length, checkpoint.spec.max_length)
            sequences += text_windows(checkpoint, text, max_length=length, decode_steps=decode_steps)
        tell = part_of(progress, 0.1, 0.3)
        logits = run_engine(source.runner, sequences, source.scratch, _counted(tell, "running the engine", sequences))
        source.release()
        seen = tapped(taps or source.taps(), sequences, source.scratch)
        quantization = quantization or quantization_of(precision)
        plan = plan_of(checkpoint, precision.arithmetic, quantization, float64_limit_bytes, seed, stored or source.stored())
        angles = Angles(plan.reference, seen)
        outputs = run_reference(
            checkpoint,
            [sequence.tokens for sequence in sequences],
            plan.variants,
            scratch=source.scratch,
            on_taps=angles,
            progress=part_of(progress, 0.3, 0.9),
        )
        invariants = invariants_of(checkpoint, part_of(progress, 0.9, 0.95))
        progress("comparing", 0.96)
        report = report_of(
            compared(plan, sequences, logits, outputs, angles),
            name=name or source.name,
            subject=source.subject,
        )
        return dataclasses.replace(report, invariants=invariants)


@dataclass(frozen=True)
class Plan:
    """Which ways the PyTorch model is run. `reference`: the variant that the engine should agree with."""

    wide: str
    precision: str
    quantization: Quantization | None
    variants: tuple[Variant, ...]
    audit: WeightAudit | None
    served: WeightAudit | None = None

    @property
    def reference(self) -> str:
        """The name of the variant that the engine should agree with."""
        return ORIGINAL if self.quantization is None else QUANTIZED


def plan_of(
    checkpoint: Checkpoint,
    precision: str,
    quantization: Quantization | None,
    limit: int,
    seed: int,
    stored: StoredRows | None = None,
) -> Plan:
    wide = "float64" if 8 * parameters(checkpoint) <= limit else "float32"
    rounds = quantization is not None and quantization.activation_block is not None
    # Where the reference itself is in the engine's precision, another kernel (another order of summation) stands in.
    attention = "sdpa" if precision == wide and not rounds else "eager"
    if quantization is None:
        noise = Variant(NOISE, precision, attention, tapped=True)
        return Plan(wide, precision, None, (Variant(ORIGINAL, wide, tapped=True), noise), None)
    if stored is not None and checkpoint.spec.position == "research":
        stored = None  # whose rows of q and k have changed places in an engine
    change = QuantizedWeights(quantization, folded_factors(checkpoint, precision), stored)
    block = quantization.activation_block
    round_input = None if block is None else lambda x: round_to_int8(x, block or x.shape[-1])
    return Plan(
        wide,
        precision,
        quantization,
        (
            Variant(ORIGINAL, wide),
            Variant(QUANTIZED, wide, change=change, tapped=True),
            Variant(NOISE, precision, attention, change, round_input, tapped=True),
            # float32 is wide enough here: its noise is hundreds of times below the smallest step's effect.
            Variant(PERTURBED, "float32", change=PerturbedWeights(quantization, seed)),
        ),
        change.audit,
        None if stored is None else change.served,
    )


@dataclass
class Angles:
    """Compares taps while the reference's layer is there: for the engine and the noise, by sequence, name -> [T]."""

    reference: str
    seen: Sequence[Mapping[str, NDArray[np.floating]]]
    engine: list[dict[str, Array]] = field(default_factory=list)
    noise: list[dict[str, Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.engine, self.noise = [{} for _ in self.seen], [{} for _ in self.seen]

    def __call__(self, index: int, values: Mapping[str, Taps]) -> None:
        """The values of one sequence, by variant."""
        for name, value in values[self.reference].items():
            if name in self.seen[index]:
                self.engine[index][name] = tap_distance(name, value, self.seen[index][name])
                self.noise[index][name] = tap_distance(name, value, values[NOISE][name])

    def check(self) -> None:
        """Raise EngineError for an engine whose taps are all unknown."""
        if any(self.seen) and not any(self.engine):
            foreign = sorted(name for seen in self.seen for name in seen)
            raise EngineError(
                "none of the engine's taps is known", expected="embed, layers.0.mlp.update, ...", found=", ".join(foreign[:4])
            )


def compared(
    plan: Plan,
    sequences: list[TokenSequence],
    engine: Sequence[NDArray[np.floating]],
    outputs: Mapping[str, Sequence[NDArray[np.floating]]],
    angles: Angles,
) -> Comparison:
    """Everything measured, of an engine's logits and those of every variant of the plan."""
    angles.check()

    def measure(
        base: str, run: Sequence[NDArray[np.floating]], taps: Sequence[Mapping[str, Array]] | None = None
    ) -> list[Distance]:
        taps = taps or [{}] * len(sequences)
        return [distance(a, b, s.tokens, found) for a, b, s, found in zip(outputs[base], run, sequences, taps, strict=True)]

    reference = outputs[plan.reference]
    squares = sum(float(np.sum(np.square(block, dtype=np.float64))) for logits in reference for block in _blocks(logits))
    measured = Measured(
        sequences,
        measure(plan.reference, engine, angles.engine),
        measure(plan.reference, outputs[NOISE], angles.noise),
        float(np.sqrt(squares / sum(logits.size for logits in reference))),
        plan.precision,
    )
    lost = measure(ORIGINAL, reference) if plan.quantization is not None else []
    return Comparison(
        measured=measured,
        wide=plan.wide,
        noise=_noise_name(plan),
        quantization=plan.quantization,
        audit=plan.audit,
        served=plan.served,
        loss=Loss(lost, measure(ORIGINAL, outputs[PERTURBED])) if plan.quantization is not None else None,
        end_to_end=measure(ORIGINAL, engine) if plan.quantization is not None else [],
    )


def _blocks(logits: NDArray[np.floating]) -> Iterator[NDArray[np.floating]]:
    for start in range(0, len(logits), 16):
        yield logits[start : start + 16]


def _noise_name(plan: Plan) -> str:
    """In words, what the noise is."""
    words = plan.precision
    noise = next(variant for variant in plan.variants if variant.name == NOISE)
    if plan.quantization is not None:
        words += f" with {plan.quantization.describe().split(',')[0]} weights"
        words += " and int8 activations" if noise.round_input is not None else ""
    return words + (", another attention kernel" if noise.attention != "eager" else "")


def tapped(taps: TapFunction | None, sequences: list[TokenSequence], scratch: Scratch) -> list[dict[str, NDArray[np.floating]]]:
    if taps is None:
        return [{} for _ in sequences]
    return [
        {name: scratch.kept(value) for name, value in taps(np.asarray(sequence.tokens, dtype=np.int64)).items()}
        for sequence in sequences
    ]


def _counted(progress: Progress, what: str, sequences: Sequence[TokenSequence]) -> Callable[[], None]:
    steps, done = sum(len(s.tokens) - s.prompt_length + 1 for s in sequences), 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(what, min(1.0, done / steps))

    return tick


def _check_sizes(runner: Runner, checkpoint: Checkpoint) -> None:
    if runner.vocab_size != checkpoint.spec.vocab_size:
        raise EngineError(
            "the engine was not built from this checkpoint: vocab_size",
            expected=str(checkpoint.spec.vocab_size),
            found=str(runner.vocab_size),
            remedy="pass the checkpoint that the engine's manifest names",
        )
