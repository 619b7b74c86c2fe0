"""The one table of tensors: the network's name, the name in a Hugging Face checkpoint, and what is folded between the two.

`TABLE` has a row for each tensor. The reader expects what its rows say is stored, `ngpt.weights` makes what they say
the network has, and what converts a checkpoint for another runtime goes through the names that it makes. To add a
tensor to the architecture, add a row.

    stored        model.layers.{}.mlp.up_proj.weight   model.layers.{}.attn_alpha      model.layers.{}.mlp.suv.weight
    of the network      layers.{}.mlp.up.weight              layers.{}.attn.lr         (in the rows of mlp.up and mlp.gate)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from ngpt.spec import NGPTSpec

EMBED = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
SZ = "sz.weight"
_SUV = "model.layers.{}.mlp.suv.weight"

# Storage dtypes read without loss into the float64 in which scales are folded. The names are safetensors'.
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")

Size = Literal["vocabulary", "hidden", "inner", "queries", "keys", "suv"]


def sizes(spec: NGPTSpec) -> dict[Size, int]:
    """The lengths of axes by the names that the table uses."""
    return {
        "vocabulary": spec.vocab_size,
        "hidden": spec.hidden_size,
        "inner": spec.intermediate_size,
        "queries": spec.num_heads * spec.head_dim,
        "keys": spec.num_kv_heads * spec.head_dim,
        "suv": spec.intermediate_size * (2 if spec.gated else 1),
    }


@dataclass(frozen=True)
class Scaled:
    """A vector times the spec's field `scale`; then squared, or its absolute value."""

    scale: str
    then: Literal["", "square", "absolute"] = ""


@dataclass(frozen=True)
class RowsScaled:
    """Each row times an entry of the stored vector `by`, times the spec's field `scale`, and times sqrt(hidden_size) with `root`.

    `part`: which stretch of the vector is meant, of as many entries as there are rows. `unless`: a field of the spec
    that says the stored rows are products already; then there is no such vector.
    """

    by: str
    scale: str
    root: bool = False
    part: int = 0
    unless: str = ""

    def factor(self, spec: NGPTSpec) -> float:
        """What an entry of the vector is multiplied by."""
        scale: float = getattr(spec, self.scale)
        return scale * (math.sqrt(spec.hidden_size) if self.root else 1.0)


@dataclass(frozen=True)
class Row:
    """One tensor. ``{}`` in a name stands for the number of a layer.

    Args:
        name: of the network's tensor; empty for a stored vector that is folded into others.
        stored: name in the checkpoint.
        shape: sizes of its axes, by name.
        unit_axis: the axis along which the stored vectors have norm 1, if any.
        fold: what makes the network's tensor of the stored one; None: nothing.
        when: fields of the spec that must all be true for the row to apply; `unless`: one that must not.
        column: whether a vector [n] is stored as [n, 1].
        zero_vectors: whether an exactly zero row or column (a pruned unit) does no harm.
        tied: the stored tensor that stands for it where the spec is tied; its own is then optional.
    """

    name: str
    stored: str
    shape: tuple[Size, ...]
    unit_axis: int | None = None
    fold: Scaled | RowsScaled | None = None
    when: tuple[str, ...] = ()
    unless: str = ""
    column: bool = False
    zero_vectors: bool = True
    tied: str = ""

    def applies(self, spec: NGPTSpec) -> bool:
        """Whether a network of this spec has it."""
        return all(getattr(spec, field) for field in self.when) and not (self.unless and getattr(spec, self.unless))


def _product(
    name: str, stored: str, shape: tuple[Size, Size], unit_axis: int, bias: str, *when: str, fold: RowsScaled | None = None
) -> tuple[Row, Row]:
    """Rows of a layer's matrix and its bias, to which the same fold applies. `bias`: the field that says if there is one."""
    name, stored = f"layers.{{}}.{name}", f"model.layers.{{}}.{stored}"
    return (
        Row(f"{name}.weight", f"{stored}.weight", shape, unit_axis, fold, when),
        Row(f"{name}.bias", f"{stored}.bias", shape[:1], None, fold, (*when, bias)),
    )


_OF_Q = Scaled("sqk_scale", then="square")
_OF_UP, _OF_GATE = (RowsScaled(_SUV, "suv_scale", root=True, part=part) for part in (0, 1))
_OF_HEAD = RowsScaled(SZ, "sz_scale", unless="sz_folded")

# In the order of the forward pass.
TABLE = (
    # A zero row of the embedding would be divided by its own norm: there is no direction to take.
    Row("embed", EMBED, ("vocabulary", "hidden"), unit_axis=1, zero_vectors=False),
    *_product("attn.q", "self_attn.q_proj", ("queries", "hidden"), 1, "attention_bias"),
    *_product("attn.k", "self_attn.k_proj", ("keys", "hidden"), 1, "attention_bias"),
    *_product("attn.v", "self_attn.v_proj", ("keys", "hidden"), 1, "attention_bias"),
    Row("layers.{}.attn.q_scale", "model.layers.{}.self_attn.sqk.weight", ("queries",), fold=_OF_Q, column=True),
    *_product("attn.o", "self_attn.o_proj", ("hidden", "queries"), 0, "attention_bias"),
    Row("layers.{}.attn.lr", "model.layers.{}.attn_alpha", ("hidden",), fold=Scaled("attn_alpha_scale", then="absolute")),
    *_product("mlp.up", "mlp.up_proj", ("inner", "hidden"), 1, "mlp_bias", fold=_OF_UP),
    *_product("mlp.gate", "mlp.gate_proj", ("inner", "hidden"), 1, "mlp_bias", "gated", fold=_OF_GATE),
    Row("", _SUV, ("suv",), column=True),
    *_product("mlp.down", "mlp.down_proj", ("hidden", "inner"), 0, "mlp_bias"),
    Row("layers.{}.mlp.lr", "model.layers.{}.mlp_alpha", ("hidden",), fold=Scaled("mlp_alpha_scale", then="absolute")),
    Row("head.weight", LM_HEAD, ("vocabulary", "hidden"), unit_axis=1, fold=_OF_HEAD, tied=EMBED),
    Row("", SZ, ("vocabulary",), unless="sz_folded", column=True),
)


@dataclass(frozen=True)
class Expected:
    """What a stored tensor must look like. ``unit_axis`` is the axis along which vectors have norm 1, if any."""

    shape: tuple[int, ...]
    unit_axis: int | None = None
    required: bool = True
    zero_vectors: bool = True  # an exactly zero row or column (a pruned unit) does no harm


@dataclass(frozen=True)
class Canonical:
    """A tensor of the network: its shape, the stored tensor that it is made of, and the fold, whose vector has its full name."""

    shape: tuple[int, ...]
    stored: str
    fold: Scaled | RowsScaled | None = None


def expected_tensors(spec: NGPTSpec) -> dict[str, Expected]:
    """Name to `Expected` for every stored tensor, in the order of the forward pass. ``lm_head`` is optional iff tied."""
    size, found = sizes(spec), {}
    for row, layer in _rows(spec):
        shape = tuple(size[axis] for axis in row.shape) + ((1,) if row.column else ())
        required = not (row.tied and spec.tied)
        # Where the rows carry their scales already, any norm is possible.
        unit_axis = None if isinstance(row.fold, RowsScaled) and _already(row.fold, spec) else row.unit_axis
        found[row.stored.format(layer)] = Expected(shape, unit_axis, required, row.zero_vectors)
    return found


def canonical_tensors(spec: NGPTSpec) -> dict[str, Canonical]:
    """Name to `Canonical` for every tensor of the network, in the order of the forward pass."""
    size, found = sizes(spec), {}
    for row, layer in _rows(spec):
        if row.name:
            stored = row.tied if row.tied and spec.tied else row.stored
            shape, fold = tuple(size[axis] for axis in row.shape), row.fold
            if isinstance(fold, RowsScaled):
                fold = None if _already(fold, spec) else dataclasses.replace(fold, by=fold.by.format(layer))
            found[row.name.format(layer)] = Canonical(shape, stored.format(layer), fold)
    return found


class Name(NamedTuple):
    """A canonical name in parts: layers.3.attn.q.weight is layer 3, part "attn.q", kind "weight".

    Without a layer (the embedding and the head) it is None; without a kind it is empty.
    """

    layer: int | None
    part: str
    kind: str

    @classmethod
    def of(cls, name: str) -> Name:
        """The parts of a name that `canonical_tensors` gives, or of one without its kind. Raises ValueError for another."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"no canonical name: {name!r}")
        layer, part, end, kind = match.groups()
        return cls(None if layer is None else int(layer), part or end, kind or "")


_NAME = re.compile(r"(?:layers\.(0|[1-9]\d*)\.([a-z_]+(?:\.[a-z_]+)??)|([a-z_]+))(?:\.(weight|bias))?")


def _already(fold: RowsScaled, spec: NGPTSpec) -> bool:
    return bool(fold.unless and getattr(spec, fold.unless))


def _rows(spec: NGPTSpec) -> Iterator[tuple[Row, int]]:
    """Rows that apply, those of layers once a layer."""
    for of_layers, rows in groupby(TABLE, key=lambda row: "{}" in row.stored):
        chosen = [row for row in rows if row.applies(spec)]
        for layer in range(spec.num_layers if of_layers else 1):
            yield from ((row, layer) for row in chosen)
