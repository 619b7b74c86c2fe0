"""From distances to the report: the checks, the verdict, and the numbers that head it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.parity.compare import Distance
from engines.parity.gate import (
    LOSS_MULTIPLE,
    MEAN_MULTIPLE,
    WORST_MULTIPLE,
    Check,
    Loss,
    Measured,
    checks,
    stable_margin,
    stable_positions,
    tapped,
    verdict_of,
)
from engines.parity.prompts import TokenSequence
from engines.parity.quantized import Quantization, WeightAudit
from engines.parity.report import ParityReport, SequenceResult
from engines.parity.subject import Subject


@dataclass(frozen=True)
class Comparison:
    """Everything measured. `wide`: the reference's precision. `noise`: in words, what the noise is. `loss`, `end_to_end`: of a
    quantised engine, what its weights cost and how far it is from the original."""

    measured: Measured
    wide: str
    noise: str
    quantization: Quantization | None
    audit: WeightAudit | None
    served: WeightAudit | None
    loss: Loss | None
    end_to_end: list[Distance]


def report_of(found: Comparison, *, name: str, subject: Subject | None) -> ParityReport:
    """Checks, verdict, summary and curves."""
    measured, decided = found.measured, checks(found.measured, found.audit, found.loss, found.served)
    verdict = verdict_of(decided)
    summary: dict[str, Any] = {"verdict": verdict, "engine": name, **_headlines(found, decided)}
    if found.quantization is not None and found.loss is not None:
        summary["quantization"] = found.quantization.describe()
        summary["quantization_loss"] = _loss(measured.sequences, found.loss.quantized)
        summary["engine_loss"] = _loss(measured.sequences, found.end_to_end)
    return ParityReport(verdict, summary, decided, _curves(measured), subject=None if subject is None else subject.to_dict())


def _headlines(found: Comparison, decided: list[Check]) -> dict[str, Any]:
    measured = found.measured
    ours, floor, sequences = measured.engine, measured.noise, measured.sequences
    stable = np.concatenate(stable_positions(measured))
    return {
        "decided": f"{sum(check.sample > 0 for check in decided)} of {len(decided)} checks",
        "not_applicable": [check.name for check in decided if not check.sample],
        "reference": f"PyTorch {found.wide}" + (" with the same quantised weights" if found.audit else ""),
        "noise": f"PyTorch {found.noise}",
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
        "stable_positions": float(np.mean(stable)),
        **_perplexity(measured),
        "first_divergence": first_divergence(decided),
        "taps": len(tapped(ours)),
        "gate": {"mean": MEAN_MULTIPLE, "worst position": WORST_MULTIPLE, "quantisation loss": LOSS_MULTIPLE},
        "failed_checks": [check.name for check in decided if check.failed],
    }


def first_divergence(decided: Sequence[Check]) -> str | None:
    """The first tap, in the order of the forward pass, that leaves its limit: where to start looking."""
    return next((check.tap for check in decided if check.tap and check.failed), None)


def _curves(measured: Measured) -> list[SequenceResult]:
    limit = stable_margin(measured)
    return [
        SequenceResult(
            name=sequence.name,
            prompt_length=sequence.prompt_length,
            kl=e.kl.tolist(),
            kl_noise=n.kl.tolist(),
            max_abs=e.max_abs.tolist(),
            max_abs_noise=n.max_abs.tolist(),
            margin=e.margin.tolist(),
            stable_margin=limit,
            other_choice=np.flatnonzero(~e.top1).tolist(),
            angles={tap: float(values.mean()) for tap, values in e.angles.items()},
            angles_noise={tap: float(n.angles[tap].mean()) for tap in e.angles if tap in n.angles},
            tokens=list(sequence.tokens),
        )
        for sequence, e, n in zip(measured.sequences, measured.engine, measured.noise, strict=True)
    ]


def _perplexity(measured: Measured) -> dict[str, Any]:
    """Of engine and reference over the text that was given; every token but the first of each window is predicted."""
    found = [d for s, d in zip(measured.sequences, measured.engine, strict=True) if s.from_file]
    if not found:
        return {}
    reference, engine = (float(np.exp(np.mean(np.concatenate([d.nll[i] for d in found])))) for i in (0, 1))
    tokens = sum(len(d.nll[0]) for d in found)
    return {"perplexity": {"engine": engine, "reference": reference, "tokens": tokens, "windows": len(found)}}


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
