"""`verify`: the whole parity check of one engine against the PyTorch model."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.parity.compare import Distance, Runner, TapFunction, distance, run_engine
from engines.parity.gate import (
    LOSS_MULTIPLE,
    MEAN_MULTIPLE,
    WORST_MULTIPLE,
    Loss,
    Measured,
    checks,
    stable_margin,
    stable_positions,
    tap_names,
    verdict_of,
)
from engines.parity.outputs import Outputs
from engines.parity.prompts import TokenSequence, make_sequences
from engines.parity.quantized import (
    Quantization,
    WeightAudit,
    put_perturbed_weights,
    put_quantized_weights,
    quantization_of,
    quantize_activations,
)
from engines.parity.reference import TorchReference, loadable_folder
from engines.parity.report import ParityReport, SequenceResult
from engines.record import recorded_precision
from engines.runtimes import precision_of
from export.precision import Precision, plain
from ngpt.checkpoint import Checkpoint, expected_tensors, open_checkpoint
from ngpt.errors import EngineError
from ngpt.progress import Progress, silent

FLOAT64_LIMIT_BYTES = 8 << 30
PARITY_SLOTS = 3  # enough for ragged batches, and for sequences that reuse a slot


def verify(
    engine: Any,
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    prompts: Sequence[str | Sequence[int]] | None = None,
    decode_steps: int | None = None,
    seed: int = 0,
    precision: Precision | str | None = None,
    runtime: str | None = None,
    quantization: Quantization | None = None,
    taps: TapFunction | None = None,
    float64_limit_bytes: int = FLOAT64_LIMIT_BYTES,
    name: str | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Compare an engine with `NGPTForCausalLM` of the same checkpoint, both fed the same tokens.

    Args:
        engine: a folder, a loaded engine, or a bare runner.
        checkpoint: the folder or file that the engine was built from, or it opened.
        prompts: texts, or lists of token ids, which the model continues greedily. Unless given: random tokens, and text where the
            checkpoint has a tokenizer.
        decode_steps: tokens decoded after each prompt; 64 unless given, or half the model's length where that is less.
        seed: of the random tokens.
        precision: what the engine computes in and stores, itself or by its name in ``runtime``. Unless given: what the
            manifest says, else float32 everywhere.
        runtime: the runtime in whose words ``precision`` is; what the manifest says, else "onnxruntime".
        quantization: another idea of the engine's weights than ``precision`` gives.
        taps: gives the engine's hidden states for the check layer by layer: token ids [T] to name -> float32 [T, E].
        float64_limit_bytes: the reference is float64 where the model fits in so many bytes, else float32; the report says which.
        name: heads the report; the manifest's unless given.
        progress: called with what is being done and the part that is done.

    Returns:
        The report. Numbers that disagree are no exception: they are the verdict "fail".

    Raises:
        EngineError: the engine misbehaves.
        CheckpointError, ConfigError: bad input.
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    runner, owned, own_name, declared, declared_runtime = _runner_of(engine)
    try:
        _check_sizes(runner, checkpoint)
        precision = precision_of(runtime or declared_runtime, precision) if isinstance(precision, str) else precision or declared
        work = _Work(checkpoint, precision.arithmetic, quantization or quantization_of(precision), float64_limit_bytes, progress)
        with loadable_folder(checkpoint) as folder:
            sequences, original = work.original(folder, checkpoint, prompts, runner.max_length, decode_steps, seed)
            reference, audit = work.reference(folder, sequences, original)
            perturbed = work.perturbed(folder, sequences, seed)
            noise = work.noise(folder, sequences)
        work.tell("running the engine")
        outputs = run_engine(runner, sequences, taps)
    finally:
        if owned is not None:
            owned.close()
    work.tell("comparing")
    return work.report(name or own_name, sequences, original, reference, noise, outputs, audit, perturbed)


class _Work:
    """The steps of one verification; every PyTorch model is dropped before the next is loaded."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: str,
        quantization: Quantization | None,
        limit: int,
        progress: Progress,
    ) -> None:
        self.precision = precision
        self.quantization = quantization
        self.progress = progress
        self.done = 0
        self.steps = 5 if quantization is None else 6
        parameters = sum(int(np.prod(expected.shape)) for expected in expected_tensors(checkpoint.spec).values())
        self.wide = "float64" if 8 * parameters <= limit else "float32"

    def tell(self, what: str) -> None:
        self.progress(what, self.done / self.steps)
        self.done += 1

    def original(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        prompts: Sequence[str | Sequence[int]] | None,
        length: int,
        steps: int | None,
        seed: int,
    ) -> tuple[list[TokenSequence], list[Outputs]]:
        """The sequences, and the unquantised model's outputs in the wide precision."""
        self.tell(f"running PyTorch in {self.wide}")
        model = TorchReference(folder, self.wide)
        sequences = make_sequences(
            checkpoint,
            prompts,
            max_length=min(length, checkpoint.spec.max_length),
            decode_steps=steps,
            seed=seed,
            continue_greedily=model.continue_greedily,
        )
        return sequences, _run(model, sequences)

    def reference(
        self, folder: Path, sequences: list[TokenSequence], original: list[Outputs]
    ) -> tuple[list[Outputs], WeightAudit | None]:
        """What the engine should compute: the original, or the same with quantised weights."""
        if self.quantization is None:
            self.tell("using that run as the reference")
            return original, None
        self.tell(f"running PyTorch in {self.wide} with quantised weights")
        model = TorchReference(folder, self.wide)
        audit = put_quantized_weights(model.model, self.quantization)
        return _run(model, sequences), audit

    def perturbed(self, folder: Path, sequences: list[TokenSequence], seed: int) -> list[Outputs]:
        """For a quantised engine, the original with its weights moved at random within half a step; else nothing.

        float32 is wide enough: its noise is hundreds of times below the smallest step's effect.
        """
        if self.quantization is None:
            return []
        self.tell("running PyTorch with random errors of the format's step")
        model = TorchReference(folder, "float32")
        put_perturbed_weights(model.model, self.quantization, seed)
        return _run(model, sequences)

    def noise(self, folder: Path, sequences: list[TokenSequence]) -> list[Outputs]:
        """What PyTorch computes in the engine's precision.

        Where the reference itself is float32, a float32 run with another attention kernel (another order of
        summation) stands in.
        """
        self.tell(f"running PyTorch in {self.noise_name}")
        other_kernel = self.precision == self.wide and not self._rounds_activations
        model = TorchReference(folder, self.precision, attention="sdpa" if other_kernel else "eager")
        if self.quantization is not None:
            put_quantized_weights(model.model, self.quantization)
            if self.quantization.activation_block is not None:
                quantize_activations(model.model, self.quantization)
        return _run(model, sequences)

    @property
    def _rounds_activations(self) -> bool:
        return self.quantization is not None and self.quantization.activation_block is not None

    @property
    def noise_name(self) -> str:
        """In words, what the noise is."""
        words = self.precision
        if self.quantization is not None:
            words += f" with {self.quantization.describe().split(',')[0]} weights"
            words += " and int8 activations" if self._rounds_activations else ""
        if self.precision == self.wide and not self._rounds_activations:
            words += ", another attention kernel"
        return words

    def report(
        self,
        name: str,
        sequences: list[TokenSequence],
        original: list[Outputs],
        reference: list[Outputs],
        noise: list[Outputs],
        engine: list[Outputs],
        audit: WeightAudit | None,
        perturbed: list[Outputs],
    ) -> ParityReport:
        """Distances, checks, verdict, summary."""
        ours, floor, lost, end_to_end = (
            [distance(a, b, s.tokens) for a, b, s in zip(base, run, sequences, strict=True)]
            for base, run in (
                (reference, engine),
                (reference, noise),
                (original, reference),
                (original, engine),
            )
        )
        size = float(np.sqrt(np.mean([np.mean(np.square(t.logits)) for t in reference])))
        measured = Measured(sequences, ours, floor, size, self.precision)
        loss = None
        if perturbed:
            random = [distance(a, b, s.tokens) for a, b, s in zip(original, perturbed, sequences, strict=True)]
            loss = Loss(lost, random)
        found = checks(measured, audit, loss)
        verdict = verdict_of(found)
        summary: dict[str, Any] = {
            "verdict": verdict,
            "engine": name,
            "reference": f"PyTorch {self.wide}" + (" with the same quantised weights" if audit else ""),
            "noise": f"PyTorch {self.noise_name}",
            "sequences": len(sequences),
            "positions": sum(len(s.tokens) for s in sequences),
            "decode_steps": max(len(s.tokens) - s.prompt_length for s in sequences),
            "max_abs_logit_error": _joined(ours, "max_abs", np.max),
            "max_abs_logit_noise": _joined(floor, "max_abs", np.max),
            "kl_mean": _joined(ours, "kl", np.mean),
            "kl_max": _joined(ours, "kl", np.max),
            "kl_mean_noise": _joined(floor, "kl", np.mean),
            "cosine_min": _joined(ours, "cosine", np.min),
            "norm_ratio": {
                "min": _joined(ours, "norm_ratio", np.min),
                "max": _joined(ours, "norm_ratio", np.max),
            },
            "top1_agreement": _joined(ours, "top1", np.mean),
            "stable_positions": float(np.mean(np.concatenate(stable_positions(measured)))),
            "first_divergence": _first_divergence(found),
            "taps": len(tap_names(ours)),
            "gate": {"mean": MEAN_MULTIPLE, "worst position": WORST_MULTIPLE, "quantisation loss": LOSS_MULTIPLE},
            "decided": f"{sum(check.sample > 0 for check in found)} of {len(found)} checks",
            "not_applicable": [check.name for check in found if not check.sample],
            "failed_checks": [check.name for check in found if check.failed],
        }
        if self.quantization is not None:
            summary["quantization"] = self.quantization.describe()
            summary["quantization_loss"] = _loss(sequences, lost)
            summary["engine_loss"] = _loss(sequences, end_to_end)
        results = [
            SequenceResult(
                name=sequence.name,
                prompt_length=sequence.prompt_length,
                kl=e.kl.tolist(),
                kl_noise=n.kl.tolist(),
                max_abs=e.max_abs.tolist(),
                max_abs_noise=n.max_abs.tolist(),
                margin=e.margin.tolist(),
                stable_margin=stable_margin(measured),
                other_choice=np.flatnonzero(~e.top1).tolist(),
                angles={tap: float(values.mean()) for tap, values in e.angles.items()},
                angles_noise={tap: float(n.angles[tap].mean()) for tap in e.angles if tap in n.angles},
            )
            for sequence, e, n in zip(sequences, ours, floor, strict=True)
        ]
        return ParityReport(verdict, summary, found, results)


def _run(model: TorchReference, sequences: list[TokenSequence]) -> list[Outputs]:
    outputs = [model.run(sequence.tokens) for sequence in sequences]
    del model.model  # two copies of a large model must never be alive together
    gc.collect()
    return outputs


def _joined(distances: list[Distance], field: str, reduce: Callable[[Any], Any]) -> float:
    return float(reduce(np.concatenate([getattr(d, field) for d in distances])))


def _loss(sequences: list[TokenSequence], distances: list[Distance]) -> dict[str, float]:
    """Against the original weights: KL and agreement everywhere; perplexities on text if there is any."""
    text = [d for s, d in zip(sequences, distances, strict=True) if s.is_text] or distances
    before, after = (float(np.exp(np.mean(np.concatenate([d.nll[i] for d in text])))) for i in (0, 1))
    return {
        "kl_mean": _joined(distances, "kl", np.mean),
        "kl_max": _joined(distances, "kl", np.max),
        "top1_agreement": _joined(distances, "top1", np.mean),
        "perplexity_original": before,
        "perplexity": after,
        "perplexity_change": after / before - 1,
    }


def _first_divergence(found: Sequence[Any]) -> str | None:
    """The first tap whose angle leaves its limit: where to start looking."""
    bad = next((check for check in found if check.name.startswith("angle at ") and check.failed), None)
    return None if bad is None else bad.name.removeprefix("angle at ").split(",")[0]


def _check_sizes(runner: Runner, checkpoint: Checkpoint) -> None:
    if runner.vocab_size != checkpoint.spec.vocab_size:
        raise EngineError(
            "the engine was not built from this checkpoint: vocab_size",
            expected=str(checkpoint.spec.vocab_size),
            found=str(runner.vocab_size),
            remedy="pass the checkpoint that the engine's manifest names",
        )


def _runner_of(engine: Any) -> tuple[Runner, Any, str, Precision, str]:
    """(runner, what to close afterwards or None, name, precision, runtime) of whatever was passed as an engine."""
    owned = None
    if isinstance(engine, str | os.PathLike):
        from engines.runtime.compatibility import slots_for
        from engines.runtime.engine import load_engine
        from engines.runtime.manifest import read_manifest

        owned = engine = load_engine(Path(engine), num_slots=slots_for(read_manifest(Path(engine)), PARITY_SLOTS))
    manifest = getattr(engine, "manifest", None)
    runner: Any = engine
    for holder in (engine, getattr(engine, "scheduler", None)):
        if getattr(holder, "runner", None) is not None:
            runner = holder.runner  # type: ignore[union-attr]
            break
    missing = [part for part in ("open", "close", "prefill", "decode", "vocab_size") if not hasattr(runner, part)]
    if missing:
        if owned is not None:
            owned.close()
        raise EngineError(
            "this is not an engine",
            expected="a folder, a loaded engine or a runner",
            found=type(engine).__name__,
        )
    if manifest is None:
        return runner, owned, type(runner).__name__, plain("fp32", "float32"), "onnxruntime"
    return runner, owned, manifest.name, recorded_precision(manifest), manifest.target.runtime
