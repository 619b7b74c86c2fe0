"""Which part of which canonical tensor goes where in a rank's file, without reading any.

Names and shapes are those of the modules in `export.trtllm.model`. q, k and v are one product; o and down are divided by columns and
everything before them by rows. Embedding and head are divided by vocabulary rows, filled with zero rows up to a multiple of
tp: an embedding's all-reduce adds zeros to the row that one rank holds, which is exact, and saves V * E / tp on every rank.
Biases of column-divided products are whole on every rank, because `RowLinear` adds them after its all-reduce
(tensorrt_llm/layers/linear.py at commit 03961722, `RowLinear.collect_and_bias`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights

Kind = Literal["matrix", "stored", "vector"]
"""A matrix may be quantised; what is stored has the engine's type; a vector (and a scale) is float32."""
MODULES = {
    "attn.q": "attention.qkv", "attn.k": "attention.qkv", "attn.v": "attention.qkv", "attn.o": "attention.dense",
    "mlp.up": "mlp.fc", "mlp.gate": "mlp.gate", "mlp.down": "mlp.proj",
}  # fmt: skip
"""Canonical product -> module of TensorRT-LLM's own names, which its quantisation goes by."""


@dataclass(frozen=True)
class Part:
    """`rows` and `columns` (None: all) of the canonical tensor `source`, at row `at` of the rank's tensor."""

    source: str
    rows: range | None = None
    columns: range | None = None
    at: int = 0


@dataclass(frozen=True)
class Entry:
    """A tensor of a rank's file. Rows that no part covers are zero."""

    kind: Kind
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def rank_layout(weights: DeployedWeights, parallel: Parallel, rank: int) -> dict[str, Entry]:
    """Tensors of world rank `rank`, scales of quantisation excepted: name -> Entry."""
    spec = weights.spec
    stage, tp_rank = divmod(rank, parallel.tp)
    heads = _channels(parallel.query_heads(tp_rank, spec.num_heads), spec.head_dim)
    keys = _channels(parallel.key_heads(tp_rank, spec.num_kv_heads), spec.head_dim)
    inner = _share(spec.intermediate_size, parallel.tp, tp_rank)
    each = math.ceil(spec.vocab_size / parallel.tp)
    vocabulary = range(tp_rank * each, min((tp_rank + 1) * each, spec.vocab_size))
    table = (each, spec.hidden_size)
    layout: dict[str, Entry] = {}
    if stage == 0:
        layout["transformer.vocab_embedding.weight"] = Entry("stored", table, (Part("embed", vocabulary),))
    for local, layer in enumerate(parallel.layers(stage, spec.num_layers)):
        source, target = f"layers.{layer}.", f"transformer.layers.{local}."
        for kind in ("weight", "bias"):
            rows = [
                (f"{source}attn.{part}.{kind}", part_rows) for part, part_rows in zip("qkv", (heads, keys, keys), strict=True)
            ]
            _divide_rows(layout, weights, f"{target}attention.qkv.{kind}", rows)
            for part in ("up", "gate"):
                module = MODULES[f"mlp.{part}"]
                _divide_rows(layout, weights, f"{target}{module}.{kind}", [(f"{source}mlp.{part}.{kind}", inner)])
        for part, columns in (("attn.o", heads), ("mlp.down", inner)):
            name = f"{target}{MODULES[part]}"
            shape = (spec.hidden_size, len(columns))
            layout[f"{name}.weight"] = Entry("matrix", shape, (Part(f"{source}{part}.weight", None, columns),))
            if weights.has(f"{source}{part}.bias"):
                layout[f"{name}.bias"] = Entry("stored", shape[:1], (Part(f"{source}{part}.bias"),))
        layout[f"{target}attention.q_scale"] = Entry("vector", (len(heads),), (Part(f"{source}attn.q_scale", heads),))
        for part, module in (("attn", "attention"), ("mlp", "mlp")):
            layout[f"{target}{module}.lr"] = Entry("vector", (spec.hidden_size,), (Part(f"{source}{part}.lr"),))
    if stage == parallel.pp - 1:
        layout["lm_head.weight"] = Entry("stored", table, (Part("head.weight", vocabulary),))
    return layout


def _divide_rows(layout: dict[str, Entry], weights: DeployedWeights, name: str, sources: list[tuple[str, range]]) -> None:
    """Rows of one or several canonical tensors below each other, where the network has them."""
    if not weights.has(sources[0][0]):
        return
    parts, at = [], 0
    for source, rows in sources:
        parts.append(Part(source, rows, None, at))
        at += len(rows)
    rest = weights.shape(sources[0][0])[1:]
    layout[name] = Entry("matrix" if rest else "stored", (at, *rest), tuple(parts))


def _channels(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)


def _share(size: int, ways: int, index: int) -> range:
    return range(index * size // ways, (index + 1) * size // ways)
