"""Which part of which canonical tensor goes where in a rank's file, without reading any.

Names and shapes are those of the modules in `export.trtllm.model`. q, k and v are one product; o and down are divided
by columns and everything before them by rows. Embedding and head are divided by vocabulary rows, filled with zero
rows up to a multiple of tp: an embedding's all-reduce adds zeros to the row that one rank holds, which is exact, and
saves V * E / tp on every rank.
Biases of column-divided products are whole on every rank, because `RowLinear` adds them after its all-reduce
(tensorrt_llm/layers/linear.py at commit 03961722, `RowLinear.collect_and_bias`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt.errors import UnsupportedError
from ngpt.tensor_names import Name

Kind = Literal["matrix", "stored", "vector"]
"""A matrix may be quantised; what is stored has the engine's type; a vector (and a scale) is float32."""
Share = Literal["query heads", "key heads", "inner", "vocabulary", "whole"]
"""What a rank holds of an axis: the channels of its heads, its part of the MLP, its rows of the vocabulary; or all of it."""


@dataclass(frozen=True)
class Place:
    """Where a part of the network goes: the module (of a layer, or of the model), and how the rows or `columns` are divided."""

    module: str
    share: Share
    columns: bool = False


PLACES = {
    "embed": Place("transformer.vocab_embedding.weight", "vocabulary"),
    "attn.q": Place("attention.qkv", "query heads"),
    "attn.k": Place("attention.qkv", "key heads"),
    "attn.v": Place("attention.qkv", "key heads"),
    "attn.q_scale": Place("attention.q_scale", "query heads"),
    "attn.o": Place("attention.dense", "query heads", columns=True),
    "attn.lr": Place("attention.lr", "whole"),
    "mlp.up": Place("mlp.fc", "inner"),
    "mlp.gate": Place("mlp.gate", "inner"),
    "mlp.down": Place("mlp.proj", "inner", columns=True),
    "mlp.lr": Place("mlp.lr", "whole"),
    "head": Place("lm_head", "vocabulary"),
}
"""Canonical part -> place. Its quantisation goes by these names of modules; parts of one module lie below each other."""


def place_of(part: str) -> Place:
    """The place of a canonical part. Raises UnsupportedError where this converter knows none."""
    if part not in PLACES:
        raise UnsupportedError(f"the tensor {part} in TensorRT-LLM", expected=", ".join(PLACES), found=part)
    return PLACES[part]


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
    """Tensors of world rank `rank`, scales of quantisation excepted: name -> Entry.

    Raises UnsupportedError for a tensor without a place.
    """
    spec = weights.spec
    stage, tp_rank = divmod(rank, parallel.tp)
    layers, ends = parallel.layers(stage, spec.num_layers), {"embed": 0, "head": parallel.pp - 1}
    each = math.ceil(spec.vocab_size / parallel.tp)
    shares: dict[Share, range | None] = {
        "query heads": _channels(parallel.query_heads(tp_rank, spec.num_heads), spec.head_dim),
        "key heads": _channels(parallel.key_heads(tp_rank, spec.num_kv_heads), spec.head_dim),
        "inner": _share(spec.intermediate_size, parallel.tp, tp_rank),
        "vocabulary": range(tp_rank * each, min((tp_rank + 1) * each, spec.vocab_size)),
        "whole": None,
    }
    layout: dict[str, Entry] = {}
    for source in weights.names():
        layer, part, kind = Name.of(source)
        place = place_of(part)
        if stage != ends.get(part, stage) or (layer is not None and layer not in layers):
            continue
        target = place.module + (f".{kind}" if kind else "")
        if layer is not None:
            target = f"transformer.layers.{layers.index(layer)}.{target}"
        share, shape = shares[place.share], weights.shape(source)
        rows, columns = (None, share if len(shape) > 1 else None) if place.columns else (share, None)
        above = layout.get(target)
        at = above.shape[0] if above else 0
        height = each if place.share == "vocabulary" else shape[0] if rows is None else len(rows)
        width = shape[1:] if columns is None else (len(columns),)
        parts = (*(above.parts if above else ()), Part(source, rows, columns, at))
        layout[target] = Entry(_kind(place, kind, shape), (at + height, *width), parts)
    return layout


def _kind(place: Place, kind: str, shape: tuple[int, ...]) -> Kind:
    if kind == "bias" or place.share == "vocabulary":
        return "stored"
    return "matrix" if len(shape) > 1 else "vector"


def _channels(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)


def _share(size: int, ways: int, index: int) -> range:
    return range(index * size // ways, (index + 1) * size // ways)
