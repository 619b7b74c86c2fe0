"""How many GPUs a model needs for a load, and how fast they could at most decode: arithmetic, before anything is built.

Every number follows from sizes and the card's data sheet; none was measured. A decode step must read the projections, the
head and every sequence's keys and values once, so memory bandwidth bounds the rate from above: arithmetic, launches,
communication between GPUs and prefills all come on top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.memory import RESERVE, Memory, memory
from engines.runtimes import runtime_of
from engines.target import Target, load_targets
from export.trtllm.parallel import Parallel
from ngpt.errors import CheckpointError, ConfigError, TargetError, UnsupportedError
from ngpt.files import MAX_CONFIG_BYTES, contained, exists, kind_of, read_json
from ngpt.spec import NGPTSpec

MOST = (1 << 31) - 1
MOST_RANKS = 64
"""The largest tensor-parallel degree that is considered."""


@dataclass(frozen=True)
class Capacity:
    """A load on the GPUs of a target: `concurrency` sequences of `context` tokens. Bytes are those of one GPU, the fullest."""

    target: str
    runtime: str
    precision: str
    parallel: Parallel
    concurrency: int
    context: int
    memory: Memory
    bandwidth: float

    @property
    def ranks(self) -> int:
        """GPUs that share the model."""
        return self.parallel.world

    @property
    def cache(self) -> int:
        """Bytes of the whole key-value cache on one GPU."""
        return self.memory.cache_token * self.context * self.concurrency

    @property
    def free(self) -> int:
        """Bytes left on each GPU; negative: so many are missing."""
        return self.memory.free(self.context * self.concurrency)

    @property
    def most_sequences(self) -> int:
        """Sequences of this context that fit each GPU beside weights and activations; 0 when these fill it alone."""
        return self.memory.sequences(self.context)

    @property
    def step(self) -> int:
        """Bytes that one decode step reads at full context: of the embedding table a row a sequence, which is nothing."""
        return self.memory.weights - self.memory.table + self.cache

    @property
    def rate(self) -> float:
        """Upper bound of tokens per second and sequence: bandwidth over what a step reads. Stages of a pipeline work one
        after another."""
        return self.bandwidth / (self.step * self.parallel.pp)

    def arithmetic(self) -> str:
        """The sum in words, in GB of 10**9 bytes."""
        return self.memory.arithmetic(self.concurrency, self.context)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        found = self.memory
        given = {
            "target": self.target,
            "precision": self.precision,
            "ranks": self.ranks,
            "tp": self.parallel.tp,
            "pp": self.parallel.pp,
        }
        load = {"concurrency": self.concurrency, "context": self.context, "bandwidth": self.bandwidth}
        sizes = {
            "memory": found.card,
            "weights": found.weights,
            "cache_token": found.cache_token,
            "activations": found.activations,
        }
        derived = {"step": self.step, "cache": self.cache, "reserve": RESERVE, "free": self.free}
        rates = {"tokens_per_s_per_sequence_at_most": self.rate, "tokens_per_s_at_most": self.rate * self.concurrency}
        return given | load | sizes | derived | {"most_sequences": self.most_sequences} | rates

    def table(self) -> str:
        """All of it to read."""
        gb = {"memory": self.memory.card, "weights": self.memory.weights, "KV cache": self.cache}
        gb |= {"activations": self.memory.activations, "reserve": RESERVE, "free": self.free}
        divided = f"tensor parallel over {self.parallel.tp} GPU{'s' * (self.parallel.tp > 1)}"
        divided += f", {self.parallel.pp} stages" if self.parallel.pp > 1 else ""
        lines = [f"target        {self.target}, {self.precision}, {divided}"]
        lines += [f"load          {self.concurrency} sequences of {self.context} tokens", ""]
        lines += [f"{name:<13} {size / 1e9:9.2f} GB per GPU" for name, size in gb.items()]
        lines += [f"{'cache/token':<13} {self.memory.cache_token:9d} bytes per GPU", ""]
        lines += [f"fits          up to {self.most_sequences} sequences of this length"]
        each, all_of_them = f"{self.rate:.0f}", f"{self.rate * self.concurrency:.0f}"
        lines += [f"decode        at most {each} tokens/s per sequence, {all_of_them} in all"]
        lines += [f"              (memory bandwidth alone: each step reads {self.step / 1e9:.2f} GB per GPU; not measured)"]
        if self.ranks > 1 and not runtime_of(self.runtime).divides:
            lines += ["", f"note          an engine of {self.runtime} uses one GPU: build for a TensorRT-LLM target of this card"]
        return "\n".join(lines)


def read_spec(checkpoint: str | os.PathLike[str] | None) -> NGPTSpec:
    """The spec of a checkpoint, of a config.json without weights, or of the 8B model (None).

    Raises ConfigError or CheckpointError for one that cannot be read.
    """
    if checkpoint is None:
        return NGPTSpec.from_config({"model_type": "ngpt"})
    path = Path(checkpoint)
    if kind_of(path) == "folder" and exists(path, "config.json"):
        path = contained(path, "config.json")  # the weights do not matter here, nor does the library that would read them
    if path.suffix == ".json":
        try:
            config = read_json(path, limit=MAX_CONFIG_BYTES)
        except CheckpointError as error:
            raise ConfigError(f"{path} cannot be read as JSON", expected="a config.json", found=error.found) from error
        if not isinstance(config, dict):
            raise ConfigError(f"{path} is not a config", expected="a JSON object", found=type(config).__name__)
        return NGPTSpec.from_config(config)
    from ngpt.checkpoint import open_checkpoint  # a research checkpoint carries its configuration in a pickle, which takes torch

    with open_checkpoint(path) as opened:
        return opened.spec


def capacity(spec: NGPTSpec, target: Target, concurrency: int, context: int, parallel: Parallel) -> Capacity:
    """The arithmetic for one way of dividing, whether it fits or not. Raises TargetError for what cannot be asked at all."""
    if target.gpu is None:
        gpus = [known.name for known in load_targets() if known.gpu is not None]
        raise TargetError(
            f"the target {target.name} has no GPU to plan for",
            expected="one of " + ", ".join(gpus),
            found=target.name,
            remedy="choose another --target",
        )
    for name, value in (("concurrency", concurrency), ("context", context)):
        if not 1 <= value <= MOST:
            raise TargetError(f"--{name}", expected=f"1 to {MOST}", found=str(value)[:80])
    if context > spec.max_length:
        raise TargetError(
            "the context is longer than the model's",
            expected=f"at most {spec.max_length} tokens",
            found=str(context),
            remedy="lower --context",
        )
    return Capacity(
        target=target.name,
        runtime=target.runtime,
        precision=target.precision.name,
        parallel=parallel,
        concurrency=concurrency,
        context=context,
        memory=memory(spec, target, parallel, sequences=concurrency),
        bandwidth=target.gpu.bandwidth_gb_per_s * 1e9,
    )


def degrees(spec: NGPTSpec) -> list[int]:
    """Tensor-parallel degrees that `Parallel` allows, at most MOST_RANKS."""

    def allowed(ranks: int) -> bool:
        try:
            Parallel(ranks).check(spec)
        except UnsupportedError:
            return False
        return True

    return [ranks for ranks in range(1, MOST_RANKS + 1) if allowed(ranks)]


def plan_capacity(
    spec: NGPTSpec, target: Target, concurrency: int, context: int, ranks: int | None = None, stages: int = 1
) -> Capacity:
    """The smallest tensor-parallel degree that fits the load, or the given one (`ranks`), in each of `stages` of a pipeline.

    Raises TargetError with the arithmetic when it does not fit, UnsupportedError where the model cannot be divided so.
    """
    fitting = _fitting(spec, target, concurrency, context, stages)
    if ranks is None:
        found = next(fitting, None)
        if found is not None:
            return found
        ranks = degrees(spec)[-1]
        remedy = "lower --concurrency or --context, choose a narrower --precision or a card with more memory"
    else:
        found = capacity(spec, target, concurrency, context, Parallel(ranks, stages))
        if found.free >= 0:
            return found
        smallest = next(fitting, None)
        remedy = f"use --tp {smallest.parallel.tp}" if smallest else "no degree fits: lower --concurrency or --context"
    found = capacity(spec, target, concurrency, context, Parallel(ranks, stages))
    raise TargetError(
        f"the load does not fit {found.ranks} x {target.name} in {target.precision.name}",
        expected=f"at most {found.memory.card / 1e9:.2f} GB per GPU",
        found=found.arithmetic(),
        remedy=remedy,
    )


def _fitting(spec: NGPTSpec, target: Target, concurrency: int, context: int, stages: int) -> Iterator[Capacity]:
    for ranks in degrees(spec):
        found = capacity(spec, target, concurrency, context, Parallel(ranks, stages))
        if found.free >= 0:
            yield found
