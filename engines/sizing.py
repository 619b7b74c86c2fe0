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


def kv_heads(spec: NGPTSpec, ranks: int) -> int:
    """Key-value heads that one of `ranks` tensor-parallel GPUs holds: where there are fewer heads than GPUs, one, repeated."""
    return max(1, spec.num_kv_heads // ranks)


def table_bytes(spec: NGPTSpec, precision: str, ranks: int = 1) -> int:
    """Bytes of the embedding table on one of `ranks` GPUs: its rows are split, rounded up."""
    return -(-spec.vocab_size // ranks) * spec.hidden_size * STORED_BYTES.get(precision, 2)


def weight_bytes(spec: NGPTSpec, precision: str, ranks: int = 1) -> int:
    """Bytes of all weights of an engine in a precision, on one of `ranks` tensor-parallel GPUs."""
    matrices = spec.hidden_size * spec.head_dim * 2 * (spec.num_heads // ranks + kv_heads(spec, ranks))
    matrices += spec.hidden_size * spec.intermediate_size // ranks * (3 if spec.gated else 2)
    head = -(-spec.vocab_size // ranks) * spec.hidden_size * HEAD_BYTES[precision]
    return int(spec.num_layers * matrices * PROJECTION_BYTES[precision] + head) + table_bytes(spec, precision, ranks)


def cache_bytes_per_token(spec: NGPTSpec, precision: str, ranks: int = 1, kv_cache: str = "auto") -> int:
    """Bytes of keys and values that one token adds, on one of `ranks` tensor-parallel GPUs; `kv_cache` as in `Target`."""
    width = 1 if kv_cache == "fp8" else STORED_BYTES.get(precision, 2)
    return 2 * spec.num_layers * kv_heads(spec, ranks) * spec.head_dim * width


def activation_bytes(spec: NGPTSpec, precision: str, prefill_tokens: int, decode_batch: int, ranks: int = 1) -> int:
    """Bytes of a step's tensors at their widest: the MLP's two inner ones beside the residual and its update; or all logits."""
    widest = prefill_tokens * STORED_BYTES.get(precision, 2) * (2 * spec.intermediate_size // ranks + 4 * spec.hidden_size)
    return max(widest, 4 * spec.vocab_size * max(prefill_tokens, decode_batch))


def footprint(spec: NGPTSpec, target: Target) -> Footprint:
    """What an engine of `spec` takes on the target's card."""
    assert target.gpu is not None and target.profile is not None
    return Footprint(
        weights=weight_bytes(spec, target.precision),
        cache_row=cache_bytes_per_token(spec, target.precision, kv_cache=target.kv_cache) * spec.max_length,
        activations=activation_bytes(spec, target.precision, target.profile.prefill_tokens, target.profile.decode_batch),
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
