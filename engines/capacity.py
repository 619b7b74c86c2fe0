"""How many GPUs a model needs for a load, and how fast they could at most decode: arithmetic, before anything is built.

Every number follows from sizes and the card's data sheet; none was measured. A decode step must read the projections, the head and
every sequence's keys and values once, so memory bandwidth bounds the rate from above: arithmetic, launches, communication
between GPUs and prefills all come on top.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.sizing import RESERVE, activation_bytes, cache_bytes_per_token, table_bytes, weight_bytes
from engines.target import Target, load_targets
from ngpt.errors import CheckpointError, ConfigError, TargetError
from ngpt.files import MAX_CONFIG_BYTES, contained, exists, kind_of, read_json
from ngpt.spec import NGPTSpec

MOST = (1 << 31) - 1
MOST_RANKS = 64
"""The largest tensor-parallel degree that is considered."""


@dataclass(frozen=True)
class Capacity:
    """A load on `ranks` tensor-parallel GPUs of a target. Bytes are those of one GPU, `concurrency` sequences of `context` tokens.

    cache_token: keys and values that one token adds. step: what one decode step reads at full context.
    """

    target: str
    precision: str
    ranks: int
    concurrency: int
    context: int
    memory: int
    weights: int
    cache_token: int
    activations: int
    step: int
    bandwidth: float

    @property
    def cache(self) -> int:
        """Bytes of the whole key-value cache on one GPU."""
        return self.cache_token * self.context * self.concurrency

    @property
    def free(self) -> int:
        """Bytes left on each GPU; negative: so many are missing."""
        return self.memory - RESERVE - self.weights - self.activations - self.cache

    @property
    def most_sequences(self) -> int:
        """Sequences of this context that fit each GPU beside weights and activations; 0 when these fill it alone."""
        return max(0, (self.free + self.cache) // (self.cache_token * self.context))

    @property
    def rate(self) -> float:
        """Upper bound of tokens per second and sequence: bandwidth over what a step reads."""
        return self.bandwidth / self.step

    def arithmetic(self) -> str:
        """The sum in words, in GB of 10**9 bytes."""
        parts = {
            "weights": self.weights,
            f"cache ({self.concurrency} x {self.context} tokens x {self.cache_token} bytes)": self.cache,
            "activations": self.activations,
            "reserve": RESERVE,
        }
        total = sum(parts.values())
        return " + ".join(f"{size / 1e9:.2f} GB {name}" for name, size in parts.items()) + f" = {total / 1e9:.2f} GB"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        derived = {"cache": self.cache, "reserve": RESERVE, "free": self.free, "most_sequences": self.most_sequences}
        rates = {"tokens_per_s_per_sequence_at_most": self.rate, "tokens_per_s_at_most": self.rate * self.concurrency}
        return asdict(self) | derived | rates

    def table(self) -> str:
        """All of it to read."""
        gb = {"memory": self.memory, "weights": self.weights, "KV cache": self.cache, "activations": self.activations}
        gb |= {"reserve": RESERVE, "free": self.free}
        lines = [f"target        {self.target}, {self.precision}, tensor parallel over {self.ranks} GPU{'s' * (self.ranks > 1)}"]
        lines += [f"load          {self.concurrency} sequences of {self.context} tokens", ""]
        lines += [f"{name:<13} {size / 1e9:9.2f} GB per GPU" for name, size in gb.items()]
        lines += [f"{'cache/token':<13} {self.cache_token:9d} bytes per GPU", ""]
        lines += [f"fits          up to {self.most_sequences} sequences of this length"]
        each, all_of_them = f"{self.rate:.0f}", f"{self.rate * self.concurrency:.0f}"
        lines += [f"decode        at most {each} tokens/s per sequence, {all_of_them} in all"]
        lines += [f"              (memory bandwidth alone: each step reads {self.step / 1e9:.2f} GB per GPU; not measured)"]
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


def capacity(spec: NGPTSpec, target: Target, concurrency: int, context: int, ranks: int) -> Capacity:
    """The arithmetic for one degree, whether it fits or not. Raises TargetError for what cannot be asked at all."""
    if target.gpu is None or target.profile is None:
        gpus = [known.name for known in load_targets() if known.gpu is not None]
        raise TargetError(
            f"the target {target.name} has no GPU to plan for", expected="one of " + ", ".join(gpus), found=target.name,
            remedy="choose another --target",
        )  # fmt: skip
    for name, value in (("concurrency", concurrency), ("context", context)):
        if not 1 <= value <= MOST:
            raise TargetError(f"--{name}", expected=f"1 to {MOST}", found=str(value)[:80])
    if context > spec.max_length:
        raise TargetError(
            "the context is longer than the model's", expected=f"at most {spec.max_length} tokens", found=str(context),
            remedy="lower --context",
        )  # fmt: skip
    if ranks not in degrees(spec):
        raise TargetError(
            "the model cannot be split so", expected="one of " + ", ".join(map(str, degrees(spec))), found=str(ranks),
            remedy="choose another --tp: it must divide the heads and the MLP, and divide the key-value heads or be a multiple",
        )  # fmt: skip
    precision, profile = target.precision, target.profile
    weights, token = weight_bytes(spec, precision, ranks), cache_bytes_per_token(spec, precision, ranks, target.kv_cache)
    return Capacity(
        target=target.name,
        precision=precision,
        ranks=ranks,
        concurrency=concurrency,
        context=context,
        memory=int(target.gpu.memory_gb * 1e9),
        weights=weights,
        cache_token=token,
        activations=activation_bytes(spec, precision, profile.prefill_tokens, concurrency, ranks),
        # Of the embedding table a step reads a row a sequence, which is nothing.
        step=weights - table_bytes(spec, precision, ranks) + token * context * concurrency,
        bandwidth=target.gpu.bandwidth_gb_per_s * 1e9,
    )


def degrees(spec: NGPTSpec) -> list[int]:
    """Tensor-parallel degrees that split whole heads and equal parts of the MLP, at most MOST_RANKS."""

    def splits(ranks: int) -> bool:
        whole = spec.num_heads % ranks == 0 and spec.intermediate_size % ranks == 0
        return whole and (spec.num_kv_heads % ranks == 0 or ranks % spec.num_kv_heads == 0)

    return [ranks for ranks in range(1, MOST_RANKS + 1) if splits(ranks)]


def plan_capacity(spec: NGPTSpec, target: Target, concurrency: int, context: int, ranks: int | None = None) -> Capacity:
    """The smallest degree that fits the load, or the given one. Raises TargetError with the arithmetic when it does not fit."""
    fitting = _fitting(spec, target, concurrency, context)
    if ranks is None:
        found = next(fitting, None)
        if found is not None:
            return found
        ranks = degrees(spec)[-1]
        remedy = "lower --concurrency or --context, choose a narrower --precision or a card with more memory"
    else:
        found = capacity(spec, target, concurrency, context, ranks)
        if found.free >= 0:
            return found
        smallest = next(fitting, None)
        remedy = f"use --tp {smallest.ranks}" if smallest else "no degree fits: lower --concurrency or --context"
    found = capacity(spec, target, concurrency, context, ranks)
    raise TargetError(
        f"the load does not fit {ranks} x {target.name} in {target.precision}",
        expected=f"at most {found.memory / 1e9:.2f} GB per GPU", found=found.arithmetic(), remedy=remedy,
    )  # fmt: skip


def _fitting(spec: NGPTSpec, target: Target, concurrency: int, context: int) -> Iterator[Capacity]:
    for ranks in degrees(spec):
        found = capacity(spec, target, concurrency, context, ranks)
        if found.free >= 0:
            yield found
