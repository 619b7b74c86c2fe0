"""How much of a GPU's memory an engine takes: one sum, which planning, building, dry runs and the size of the decode batch
all read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engines.runtimes import runtime_of
from engines.target import Target
from export.precision import ITEM_BYTES, Precision
from export.trtllm.parallel import Parallel
from ngpt.errors import TargetError
from ngpt.spec import NGPTSpec
from ngpt.tensor_names import TABLE, Row, Size, sizes

RESERVE = 1 << 30
"""Bytes left to the driver, the CUDA context and the runtime's own memory."""
ONE = Parallel()
_VECTOR_BYTES = 4  # scales of heads and channels stay float32


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest of the GPUs that share a model.

    weights: all of them, `table` being the part of the embedding table, of which a decode step reads only some rows.
    cache_token: keys and values that one token of one sequence adds. activations: of a step. card: what the GPU has.
    """

    weights: int
    table: int
    cache_token: int
    activations: int
    card: int

    def free(self, tokens: int) -> int:
        """Bytes left beside the cache of so many tokens; negative: so many are missing."""
        return self.card - RESERVE - self.weights - self.activations - self.cache_token * tokens

    def sequences(self, context: int) -> int:
        """Sequences of `context` tokens that fit beside the rest; 0 where not even one does."""
        return max(0, self.free(0) // (self.cache_token * context))

    def arithmetic(self, sequences: int, context: int) -> str:
        """The sum in words, in GB of 10**9 bytes."""
        parts = {
            "weights": self.weights,
            f"cache ({sequences} x {context} tokens x {self.cache_token} bytes)": self.cache_token * context * sequences,
            "activations": self.activations,
            "reserve": RESERVE,
        }
        return (
            " + ".join(f"{size / 1e9:.2f} GB {name}" for name, size in parts.items()) + f" = {sum(parts.values()) / 1e9:.2f} GB"
        )


def memory(spec: NGPTSpec, target: Target, parallel: Parallel = ONE, *, sequences: int = 1) -> Memory:
    """What `spec` takes on each of the GPUs of a target that share it as `parallel` says, decoding `sequences` at a time.

    Raises TargetError for a target without a GPU, UnsupportedError where the model cannot be divided so.
    """
    if target.gpu is None or target.profile is None:
        raise TargetError(
            f"the target {target.name} has no GPU", expected="one with a card's memory", remedy="choose another --target"
        )
    parallel.check(spec)
    precision, profile = target.precision, target.profile
    stages = [
        (weight_bytes(spec, precision, parallel, stage), cache_bytes_per_token(spec, precision, parallel, stage), stage)
        for stage in range(parallel.pp)
    ]
    weights, token, stage = max(stages, key=lambda found: found[0] + found[1] * spec.max_length)
    return Memory(
        weights=weights,
        table=table_bytes(spec, precision, parallel) if stage == 0 else 0,
        cache_token=token,
        activations=activation_bytes(spec, precision, parallel, profile.prefill_tokens, max(sequences, profile.decode_batch)),
        card=int(target.gpu.memory_gb * 1e9),
    )


def weight_bytes(spec: NGPTSpec, precision: Precision, parallel: Parallel = ONE, stage: int = 0) -> int:
    """Bytes of the weights of one GPU of a pipeline's stage: its share of the matrices, scales included, and its vectors."""
    share, layers = _shares(spec, parallel), len(parallel.layers(stage, spec.num_layers))
    total = 0
    for row in TABLE:
        if not row.name or not row.applies(spec):
            continue
        if row.name == "embed":
            times = int(stage == 0)
        elif row.name == "head.weight":
            times = int(stage == parallel.pp - 1)
        else:
            times = layers
        total += times * _bytes(row, tuple(share[axis] for axis in row.shape), precision)
    return total


def _bytes(row: Row, shape: tuple[int, ...], precision: Precision) -> int:
    if len(shape) == 2:
        return precision.format_of(row.name).bytes(shape[0], shape[1])
    return math.prod(shape) * (ITEM_BYTES[precision.arithmetic] if row.name.endswith(".bias") else _VECTOR_BYTES)


def _shares(spec: NGPTSpec, parallel: Parallel) -> dict[Size, int]:
    """Lengths of axes on one GPU; rows of the vocabulary are rounded up."""
    return sizes(spec) | {
        "queries": len(parallel.query_heads(0, spec.num_heads)) * spec.head_dim,
        "keys": len(parallel.key_heads(0, spec.num_kv_heads)) * spec.head_dim,
        "inner": spec.intermediate_size // parallel.tp,
        "vocabulary": -(-spec.vocab_size // parallel.tp),
    }


def table_bytes(spec: NGPTSpec, precision: Precision, parallel: Parallel = ONE) -> int:
    """Bytes of one GPU's part of the embedding table: its rows are split, rounded up."""
    return precision.embedding.bytes(_shares(spec, parallel)["vocabulary"], spec.hidden_size)


def cache_bytes_per_token(spec: NGPTSpec, precision: Precision, parallel: Parallel = ONE, stage: int = 0) -> int:
    """Bytes of keys and values that one token adds on one GPU of a pipeline's stage."""
    heads = len(parallel.key_heads(0, spec.num_kv_heads))
    return 2 * len(parallel.layers(stage, spec.num_layers)) * heads * spec.head_dim * ITEM_BYTES[precision.cache]


def activation_bytes(spec: NGPTSpec, precision: Precision, parallel: Parallel, prefill_tokens: int, decode_batch: int) -> int:
    """Bytes of a step's tensors at their widest: the MLP's two inner ones beside the residual and its update; or all logits."""
    inner = spec.intermediate_size // parallel.tp
    widest = prefill_tokens * ITEM_BYTES[precision.arithmetic] * (2 * inner + 4 * spec.hidden_size)
    return max(widest, 4 * spec.vocab_size * max(prefill_tokens, decode_batch))


def total_bytes(spec: NGPTSpec, precision: Precision, parallel: Parallel = ONE) -> int:
    """Bytes of the weights of all GPUs together."""
    return parallel.tp * sum(weight_bytes(spec, precision, parallel, stage) for stage in range(parallel.pp))


def check_fits(spec: NGPTSpec, target: Target, parallel: Parallel = ONE) -> Memory:
    """The memory, or TargetError with the arithmetic when not even one sequence of full length fits."""
    found = memory(spec, target, parallel)
    if not found.sequences(spec.max_length):
        gpus = f"{parallel.world} x " if parallel.world > 1 else ""
        remedy = "choose a narrower --precision (int8, int4) or a card with more memory"
        if runtime_of(target.runtime).divides:
            remedy += ", or divide the model among more with --tp"
        raise TargetError(
            f"the model does not fit {gpus}the target {target.name} in {target.precision.name}",
            expected=f"at most {found.card / 1e9:.2f} GB per GPU",
            found=found.arithmetic(1, spec.max_length),
            remedy=remedy,
        )
    return found
