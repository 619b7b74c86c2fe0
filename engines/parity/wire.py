"""Parity through the wire: a served model is held to the same reference and the same gate, by what its answers show.

A server decodes what it chooses, so the reference is fed with the server's own answers: the prompt and its continuation are
teacher-forced through PyTorch afterwards. What is compared depends on what the server offers: logits of the prompt's tokens
and of the new ones; without the former, a prompt's logits by prompts of growing length; without either, log-probabilities
of the tokens that it chose; and without them the tokens alone. The verdict says which it was, and what could not be decided.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.parity.compare import distance
from engines.parity.gate import MARGIN_MULTIPLE, MEAN_MULTIPLE, ROUNDOFF, WORST_MULTIPLE, Check, verdict_of
from engines.parity.prompts import TokenSequence, make_sequences
from engines.parity.quantized import quantization_of
from engines.parity.reference import run_reference
from engines.parity.report import ParityReport
from engines.parity.scratch import Scratch
from engines.parity.summary import report_of
from engines.parity.verify import FLOAT64_LIMIT_BYTES, NOISE, Angles, Plan, compared, plan_of
from engines.parity.wire_checks import Chosen, choice_check, probability_checks, seed_check
from export.precision import Precision
from ngpt.checkpoint import Checkpoint
from ngpt.errors import EngineError
from ngpt.progress import Progress, part_of, silent

CONTEXT, GENERATION, PROBABILITIES = "context logits", "generation logits", "log-probabilities"
"""What a server may offer beside its tokens."""
TOGETHER = 4
"""Requests in flight at a time: a server that mixes them up must be seen to."""
_SAMPLED_SEED = 1000


@dataclass(frozen=True)
class Answer:
    """``tokens``: the new ones. ``context`` float32 [T, V]: of every token of the prompt. ``generation`` [n, V]: what each new
    token was chosen from. ``log_probs`` [n]: natural, of the new tokens, under the model itself."""

    tokens: tuple[int, ...]
    context: NDArray[np.float32] | None = None
    generation: NDArray[np.float32] | None = None
    log_probs: NDArray[np.float32] | None = None


class Server(Protocol):
    """A served model, as the check asks it. Calls come from several threads."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Who answers: url, model, version, platform, server."""

    @property
    def offered(self) -> frozenset[str]:
        """Which of `CONTEXT`, `GENERATION`, `PROBABILITIES` it gives when it is asked."""

    def ask(self, prompt: Sequence[int], tokens: int, wanted: frozenset[str], *, seed: int | None = None) -> Answer:
        """So many new tokens after a prompt; an end token does not end it. Greedy, or drawn with a seed. Raises ServerError."""


@dataclass(frozen=True)
class _Prompt:
    name: str
    tokens: tuple[int, ...]
    is_text: bool


@dataclass
class _Run:
    """A prompt with one answer: what the reference is fed with, and what is known of the server's side.

    ``logits`` [n, V] are of the tokens from ``start`` on, None where there are none. ``chosen``: the tokens it chose.
    """

    name: str
    tokens: tuple[int, ...]
    prompt_length: int
    is_text: bool
    start: int = 0
    logits: NDArray[np.float32] | None = None
    chosen: list[Chosen] = field(default_factory=list)


def verify_served(
    server: Server,
    checkpoint: Checkpoint,
    *,
    precision: Precision,
    prompts: Sequence[str | Sequence[int]] | None = None,
    decode_steps: int | None = None,
    max_length: int | None = None,
    seed: int = 0,
    together: int = TOGETHER,
    float64_limit_bytes: int = FLOAT64_LIMIT_BYTES,
    progress: Progress = silent,
) -> ParityReport:
    """Hold a running server to `NGPTForCausalLM` of a checkpoint.

    Args:
        server: who is asked (`triton_repo.served.ServedModel`).
        checkpoint: what it should be serving, opened.
        precision: what the served engine computes in and stores.
        prompts: texts, or lists of token ids; random tokens unless given, and text where the checkpoint has a tokenizer.
        decode_steps: new tokens of each answer; 64 unless given, or half the model's length where that is less.
        max_length: longest prompt with its answer; the checkpoint's unless given.
        seed: of the random tokens.
        together: requests in flight at a time.
        float64_limit_bytes: as in `verify`.
        progress: called with what is being done and the part that is done.

    Returns:
        The report, whose summary says who answered (``server``) and by what it was decided (``decided_by``). It has no
        subject: it is about a server at one moment, not about files, and no engine can be packaged by it.

    Raises:
        ServerError: no answer. EngineError: an answer that does not fit. ConfigError: bad input.
    """
    asked = _Asking(server, checkpoint.spec.vocab_size, together, part_of(progress, 0.0, 0.4))
    made = make_sequences(
        checkpoint,
        prompts,
        max_length=min(max_length or checkpoint.spec.max_length, checkpoint.spec.max_length),
        decode_steps=decode_steps,
        seed=seed,
        continue_greedily=lambda ids, steps: ids[:1] * steps,  # in the place of what the server will say
    )
    steps = max(len(each.tokens) - each.prompt_length for each in made)
    wanted = [_Prompt(each.name, each.tokens[: each.prompt_length], each.is_text) for each in made]
    runs, differing, drawn = asked.everything(wanted, steps)
    quantization = quantization_of(precision)
    plan = plan_of(checkpoint, precision.arithmetic, quantization, float64_limit_bytes, seed)
    with tempfile.TemporaryDirectory(prefix="ngpt-") as folder:
        scratch = Scratch(Path(folder))
        outputs = run_reference(
            checkpoint, [run.tokens for run in runs], plan.variants, scratch=scratch, progress=part_of(progress, 0.4, 0.95)
        )
        progress("comparing", 0.95)
        extra = _extra_checks(plan, runs, outputs, seed_check(differing, drawn))
        report = _report(server, plan, runs, outputs, extra)
    report.summary["requests"] = {"sent": asked.requests, "at a time": together}
    return report


@dataclass
class _Asking:
    """Asks for everything that is compared."""

    server: Server
    vocabulary: int
    together: int
    progress: Progress
    requests: int = 0

    def everything(self, prompts: list[_Prompt], steps: int) -> tuple[list[_Run], int, int]:
        """All runs; how many drawn answers came out otherwise when they were asked for again; and how many are no greedy ones."""
        offered = self.server.offered
        growing = [] if CONTEXT in offered else [(p, n) for p in prompts for n in range(1, len(p.tokens))]
        work: list[tuple[tuple[int, ...], int, frozenset[str], int | None]] = []
        work += [(prompt.tokens, steps, offered, None) for prompt in prompts]
        work += [(p.tokens, steps, offered - {CONTEXT}, _SAMPLED_SEED + i) for i, p in enumerate(prompts) for _ in range(2)]
        work += [(prompt.tokens[:length], 1, offered, None) for prompt, length in growing]
        with ThreadPoolExecutor(max(1, self.together)) as pool:
            answers = []
            for answer in pool.map(lambda each: self._ask(*each), work):
                answers.append(answer)
                self.progress("asking the server", len(answers) / len(work))
        self.requests = len(work)
        greedy, sampled = answers[: len(prompts)], answers[len(prompts) : 3 * len(prompts)]
        by_length = dict(zip([(p.name, length) for p, length in growing], answers[3 * len(prompts) :], strict=True))
        runs = [self._greedy(p, a, by_length) for p, a in zip(prompts, greedy, strict=True)]
        runs += [self._sampled(p, a) for p, a in zip(prompts, sampled[::2], strict=True)]
        twice = list(zip(sampled[::2], sampled[1::2], strict=True))
        otherwise = [one.tokens != plain.tokens for (one, _), plain in zip(twice, greedy, strict=True)]
        return runs, sum(one.tokens != two.tokens for one, two in twice), sum(otherwise)

    def _ask(self, prompt: Sequence[int], tokens: int, wanted: frozenset[str], seed: int | None) -> Answer:
        answer = self.server.ask(prompt, tokens, wanted, seed=seed)
        given = {CONTEXT: answer.context, GENERATION: answer.generation, PROBABILITIES: answer.log_probs}
        shapes = {
            CONTEXT: (len(prompt), self.vocabulary),
            GENERATION: (tokens, self.vocabulary),
            PROBABILITIES: (tokens,),
        }
        if len(answer.tokens) != tokens or not all(0 <= token < self.vocabulary for token in answer.tokens):
            raise EngineError("an answer", expected=f"{tokens} token ids below {self.vocabulary}", found=f"{answer.tokens}"[:200])
        for name in wanted:
            array = given[name]
            if array is None or array.shape != shapes[name]:
                found = "nothing" if array is None else str(list(array.shape))
                raise EngineError(f"{name} of an answer", expected=str(list(shapes[name])), found=found)
        return answer

    def _greedy(self, prompt: _Prompt, answer: Answer, by_length: Mapping[tuple[str, int], Answer]) -> _Run:
        """Every position of the prompt and of the answer but its last token, whose logits nobody asked for."""
        length = len(prompt.tokens)
        run = _Run(prompt.name, (*prompt.tokens, *answer.tokens[:-1]), length, prompt.is_text)
        run.chosen = _chosen(length - 1, answer)
        shorter = [by_length[prompt.name, n] for n in range(1, length)] if by_length else []
        run.chosen += [each for n, one in enumerate(shorter) for each in _chosen(n, one)]
        if answer.generation is not None:
            first = [one.generation for one in shorter if one.generation is not None]
            before = answer.context[:-1] if answer.context is not None else np.concatenate([answer.generation[:0], *first])
            run.logits = np.concatenate([before, answer.generation])
        else:
            run.logits = answer.context
        return run

    def _sampled(self, prompt: _Prompt, answer: Answer) -> _Run:
        """The positions of an answer that was drawn, after the first: its prompt's were compared."""
        length = len(prompt.tokens)
        run = _Run(f"{prompt.name}, drawn", (*prompt.tokens, *answer.tokens[:-1]), length, prompt.is_text, start=length)
        run.chosen = [dataclasses.replace(each, greedy=False) for each in _chosen(length - 1, answer)]
        if answer.generation is not None and len(answer.tokens) > 1:
            run.logits = answer.generation[1:]
        return run


def _chosen(position: int, answer: Answer) -> list[Chosen]:
    """The tokens of an answer, the first of them chosen at a position of the run."""
    log_probs = [None] * len(answer.tokens) if answer.log_probs is None else [float(value) for value in answer.log_probs]
    return [Chosen(position + n, token, value) for n, (token, value) in enumerate(zip(answer.tokens, log_probs, strict=True))]


def _extra_checks(plan: Plan, runs: list[_Run], outputs: Mapping[str, Sequence[NDArray[Any]]], seeds: Check) -> list[Check]:
    """By what needs no logits of the server: its choices, its probabilities, its seeds."""
    reference, noise = outputs[plan.reference], outputs[NOISE]
    error = [distance(a, b, run.tokens) for a, b, run in zip(reference, noise, runs, strict=True)]
    margin = MARGIN_MULTIPLE * max(float(each.max_abs.max()) for each in error)
    size = float(np.sqrt(np.mean([np.mean(np.square(logits, dtype=np.float64)) for logits in reference])))
    chosen = [(run.chosen, a, b) for run, a, b in zip(runs, reference, noise, strict=True)]
    found = [choice_check(chosen, margin)]
    found += probability_checks(chosen, ROUNDOFF[plan.precision] * size, MEAN_MULTIPLE, WORST_MULTIPLE)
    return [*found, seeds]


def _report(
    server: Server, plan: Plan, runs: list[_Run], outputs: Mapping[str, Sequence[NDArray[Any]]], extra: list[Check]
) -> ParityReport:
    who = server.identity
    name = f"{who.get('model', '?')} at {who.get('url', '?')}"
    known = [(index, run, run.logits) for index, run in enumerate(runs) if run.logits is not None]
    if known:
        parts = [slice(run.start, run.start + len(logits)) for _, run, logits in known]
        sequences = [
            TokenSequence(run.name, run.tokens[part], max(0, run.prompt_length - run.start), run.is_text)
            for (_, run, _), part in zip(known, parts, strict=True)
        ]
        shown = {
            variant: [values[index][part] for (index, _, _), part in zip(known, parts, strict=True)]
            for variant, values in outputs.items()
        }
        angles = Angles(plan.reference, [{} for _ in known])
        found = report_of(compared(plan, sequences, [logits for _, _, logits in known], shown, angles), name=name, subject=None)
    else:
        missing = [Check(f"{phase}: logit error, mean", 0.0, 0.0, 0.0, "logit", 0) for phase in ("prefill", "decode")]
        found = ParityReport("fail", {"engine": name, "reference": f"PyTorch {plan.wide}"}, missing)
    checks = [*found.checks, *extra]
    verdict = verdict_of(checks)
    summary = {
        "verdict": verdict,
        **{key: value for key, value in found.summary.items() if key != "verdict"},
        "server": dict(who),
        "decided_by": _ways(server.offered),
        "decided": f"{sum(check.sample > 0 for check in checks)} of {len(checks)} checks",
        "not_applicable": [check.name for check in checks if not check.sample],
        "failed_checks": [check.name for check in checks if check.failed],
    }
    return dataclasses.replace(found, verdict=verdict, summary=summary, checks=checks)


def _ways(offered: frozenset[str]) -> dict[str, str]:
    """By what each phase was decided."""
    alone = PROBABILITIES if PROBABILITIES in offered else "tokens"
    prefill = CONTEXT if CONTEXT in offered else f"prompts of growing length, {GENERATION if GENERATION in offered else alone}"
    return {"prefill": prefill, "decode": GENERATION if GENERATION in offered else alone}
