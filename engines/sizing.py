"""How much of a card's memory an engine takes: plain arithmetic, shown when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass

from engines.target import Target
from ngpt.errors import TargetError
from ngpt.spec import NGPTSpec

# Bytes a weight of a projection takes, its scales included: one float16 scale per 32 weights (int4) or per row (int8, fp8).
PROJECTION_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5625}
HEAD_BYTES = PROJECTION_BYTES | {"int4": 1.0}
STORED_BYTES = {"fp32": 4}  # of the embedding table, the cache (unless it is fp8) and activations; 2 in every other precision
RESERVE = 1 << 30
"""Bytes left to the driver, the CUDA context and the runtime's own memory."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the card: `weights`, `cache_row` (keys and values of one sequence at full length), `activations` of a step."""

    weights: int
    cache_row: int
    activations: int
    memory: int

    @property
    def rows(self) -> int:
        """Sequences of full length that fit beside the rest; negative or 0: not even one."""
        return (self.memory - RESERVE - self.weights - self.activations) // self.cache_row

    def arithmetic(self) -> str:
        """The sum in words, in GB of 10**9 bytes."""
        weights, row, activations, reserve = (f"{x / 1e9:.2f}" for x in (self.weights, self.cache_row, self.activations, RESERVE))
        total = (self.weights + self.cache_row + self.activations + RESERVE) / 1e9
        return (
            f"{weights} GB weights + {row} GB cache of one sequence + {activations} GB activations + {reserve} GB reserve"
            f" = {total:.2f} GB"
        )


def weight_bytes(spec: NGPTSpec, precision: str) -> int:
    """Bytes of all weights of an engine in a precision."""
    stored = STORED_BYTES.get(precision, 2)
    matrices = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads + spec.num_kv_heads)
    matrices += spec.hidden_size * spec.intermediate_size * (3 if spec.gated else 2)
    table = spec.vocab_size * spec.hidden_size
    return int(spec.num_layers * matrices * PROJECTION_BYTES[precision] + table * (stored + HEAD_BYTES[precision]))


def cache_bytes_per_token(spec: NGPTSpec, precision: str, kv_cache: str = "auto") -> int:
    """Bytes of keys and values that one token adds; `kv_cache` as in `Target`."""
    width = 1 if kv_cache == "fp8" else STORED_BYTES.get(precision, 2)
    return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width


def footprint(spec: NGPTSpec, target: Target) -> Footprint:
    """What an engine of `spec` takes on the target's card."""
    assert target.gpu is not None and target.profile is not None
    stored = STORED_BYTES.get(target.precision, 2)
    # The widest moment of a prefill: the MLP's two inner tensors beside the residual and its update; then all logits.
    tokens = target.profile.prefill_tokens
    widest = tokens * stored * (2 * spec.intermediate_size + 4 * spec.hidden_size)
    logits = 4 * spec.vocab_size * max(tokens, target.profile.decode_batch)
    return Footprint(
        weights=weight_bytes(spec, target.precision),
        cache_row=cache_bytes_per_token(spec, target.precision, target.kv_cache) * spec.max_length,
        activations=max(widest, logits),
        memory=int(target.gpu.memory_gb * 1e9),
    )


def check_fits(spec: NGPTSpec, target: Target) -> Footprint:
    """The footprint, or TargetError with the arithmetic when not even one sequence fits."""
    found = footprint(spec, target)
    if found.rows < 1:
        raise TargetError(
            f"the model does not fit the target {target.name}", expected=f"at most {found.memory / 1e9:.2f} GB",
            found=found.arithmetic(),
            remedy="choose a narrower --precision (int8, int4) or a card with more memory",
        )  # fmt: skip
    return found
