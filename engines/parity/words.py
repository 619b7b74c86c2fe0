"""A report in words: its outcome in sentences, its numbers as texts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from engines.parity.gate import Check

if TYPE_CHECKING:
    from engines.parity.report import ParityReport


def in_words(report: ParityReport) -> list[str]:
    """The outcome in sentences, from whatever the summary holds."""
    found, failed = report.summary, report.failures
    text = []
    of = str(found.get("decided") or f"{sum(check.sample > 0 for check in report.checks)} of {len(report.checks)} checks")
    if report.verdict == "pass":
        text.append(f"The engine computes what PyTorch computes from the same weights: {of} were decided, and none failed.")
    elif failed:
        text.append(
            f"The engine does not compute what PyTorch computes: {counted(len(failed), 'check')} failed; {of} were decided."
        )
    else:
        text.append("Nothing was decided, so nothing is known of this engine.")
    mean, noise = found.get("kl_mean"), found.get("kl_mean_noise")
    if isinstance(mean, float) and isinstance(noise, float):
        times = f", {math.sqrt(mean / noise):.2g} times the noise in the logits" if noise > 0 and math.isfinite(mean) else ""
        text.append(
            f"Over {found.get('positions')} positions of {counted(found.get('sequences', 0), 'sequence')} the mean KL from the "
            f"reference is {number(mean)} nat{times}."
        )
    agreed = found.get("top1_agreement")
    if isinstance(agreed, float):
        text.append(f"The first choice is the same at {agreed:.1%} of the positions.")
    lost = found.get("quantization_loss")
    if isinstance(lost, dict) and isinstance(lost.get("perplexity_change"), float):
        text.append(
            f"Rounding the weights ({found.get('quantization', 'quantised')}) costs {number(lost.get('kl_mean'))} nat of KL "
            f"against the original ones; the perplexity goes from {number(lost.get('perplexity_original'))} to "
            f"{number(lost.get('perplexity'))}."
        )
    held = found.get("perplexity")
    if isinstance(held, dict):
        text.append(
            f"Perplexity over the given text, {held.get('tokens')} tokens: {number(held.get('engine'))} for the engine, "
            f"{number(held.get('reference'))} for the reference."
        )
    return text


def number(value: Any) -> str:
    """A number of four digits, a text as it is; a list or a table as its items."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{label(str(key))} {number(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(number(item) for item in value) or "none"
    return str(value)


def label(key: str) -> str:
    """A key of the summary as words."""
    return key.replace("_", " ").replace("kl ", "KL ").replace("top1", "first choice")


def excess(check: Check) -> str:
    """How many times its limit a check measures."""
    if not check.sample or check.limit <= 0 or not math.isfinite(check.measured):
        return ""
    times = check.measured / check.limit
    return f"{times:.2f}" if times < 100 else f"{times:.0f}" if times < 1e5 else f"{times:.2g}"


def share(check: Check) -> float:
    """What part of its limit a check measures: infinity for what is not a number, less than nothing without a sample."""
    if not check.sample:
        return -1.0
    return check.measured / check.limit if check.limit > 0 and math.isfinite(check.measured) else math.inf


def counted(count: Any, what: str) -> str:
    """A number of things, in the plural where that is right."""
    return f"{count} {what}" + ("" if count == 1 else "s")
