"""What an engine's numbers are: the type it computes in, the format of its weights, the type of its cache. Spelled here and
nowhere else.

A `Format` says how one matrix is stored: plain, or as narrow codes with scales. It quantises, dequantises and knows its
bytes; it knows no runtime. A `Precision` is a choice of formats under a name that targets use ("int8"); the tables at the
end are those that the runtimes have.

To add a format: a `Format` in a `Precision` below, and the spelling of its product in the lowerings of the runtimes that have it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ngpt.errors import UnsupportedError

if TYPE_CHECKING:  # targets are read by commands that need no arithmetic, and so no NumPy
    import numpy as np
    from numpy.typing import NDArray

    from export.quantize import Quantized

    Array = NDArray[np.float32]

Dtype = Literal["float32", "float16", "bfloat16"]
"""A type that products are computed in, by NumPy's name (bfloat16: ml_dtypes')."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1}
CODE_BITS = {"int8": 8, "int4": 4, "float8_e4m3": 8}
"""Narrow types that weights are stored in, and their width."""
ROW, WHOLE = 0, -1
"""As a block: one scale a row; one scale for the whole matrix."""
_BLOCK_NAMES = {ROW: "row", WHOLE: "whole"}
_TEXT = re.compile(r"(int8|int4|float8_e4m3)/(row|whole|[1-9][0-9]{0,5})/(float32|float16|bfloat16)")


@dataclass(frozen=True)
class Format:
    """How a weight matrix [out, in] is stored.

    code: the stored type: a `Dtype` (plain), or one of CODE_BITS. block: input channels that share a scale, ROW or WHOLE;
    None for a plain format. scale: the type of the scales. Integers are symmetric. Raises UnsupportedError for a combination
    that does not exist.
    """

    code: str
    block: int | None = None
    scale: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.code in CODE_BITS:
            size = self.block
            good = size is not None and (size in (ROW, WHOLE) or (size >= 16 and size % 2 == 0))
            if not good or (self.code == "float8_e4m3" and size not in (ROW, WHOLE)):
                raise UnsupportedError(
                    f"block of the format {self.code}",
                    expected="a row or a whole matrix; for integers also an even number of at least 16",
                    found=str(size),
                )
        elif self.code not in ("float32", "float16", "bfloat16") or self.block is not None:
            raise UnsupportedError("format of weights", expected=", ".join({**ITEM_BYTES, **CODE_BITS}), found=str(self)[:100])

    def __str__(self) -> str:
        """As a manifest spells it: "float16", or code/block/scale, such as "int8/32/float32" and "int8/row/float16"."""
        if self.block is None:
            return self.code
        return f"{self.code}/{_BLOCK_NAMES.get(self.block, self.block)}/{self.scale}"

    @classmethod
    def parse(cls, text: str) -> Format:
        """The format that `str` spells so. Raises UnsupportedError."""
        if (found := _TEXT.fullmatch(text)) is None:
            return cls(text)
        code, block, scale = found.groups()
        sizes = {name: size for size, name in _BLOCK_NAMES.items()}
        return cls(code, sizes.get(block) if block in sizes else int(block), scale)  # type: ignore[arg-type]

    @property
    def plain(self) -> bool:
        """Whether it is a floating-point type without scales."""
        return self.code not in CODE_BITS

    def block_of(self, columns: int) -> int:
        """Input channels that share a scale in a matrix of so many columns."""
        # Codes of 4 bits come in pairs, so a row of integers is filled up to an even number.
        return self.block if self.block and self.block > 0 else columns + (columns % 2 if self.code != "float8_e4m3" else 0)

    def bytes(self, rows: int, columns: int) -> int:
        """What a matrix [rows, columns] takes, scales included."""
        if self.plain:
            return rows * columns * ITEM_BYTES[self.code]
        size = self.block_of(columns)
        blocks = math.ceil(columns / size)
        scales = 1 if self.block == WHOLE else rows * blocks
        return rows * blocks * size * CODE_BITS[self.code] // 8 + scales * ITEM_BYTES[self.scale]

    def quantize(self, weight: Array) -> Quantized:
        """float32 [N, K] -> `export.quantize.Quantized`; not for plain formats, nor for WHOLE, whose scale is the exporter's
        to choose."""
        from export.quantize import quantize

        if self.plain or self.block == WHOLE:
            raise UnsupportedError(
                "a format to quantise to", expected="codes with a scale for each row or block", found=str(self)
            )
        bits = None if self.code == "float8_e4m3" else CODE_BITS[self.code]
        return quantize(weight, bits, self.block_of(weight.shape[1]), self.scale)

    def round_trip(self, weight: Array) -> Array:
        """What is left of a matrix [N, K] in this format: float32 [N, K]."""
        from export.quantize import rounded

        return rounded(weight, self.code).astype("float32") if self.plain else self.quantize(weight).dequantize()


@dataclass(frozen=True)
class Precision:
    """The numbers of an engine. arithmetic: the type of products and of the states between them; norms are at least float32
    inside.

    projections, head, embedding: the formats of the matrices of attention and MLP, of the language-model head, and of the
    embedding table. cache: the type of stored keys and values. activations: the format to which the runtime's own products
    round their input in blocks along its last axis, or None. loader_quantises: the files hold plain weights, which the
    runtime brings into the formats.
    """

    name: str
    arithmetic: Dtype
    projections: Format
    head: Format
    embedding: Format
    cache: str
    activations: Format | None = None
    loader_quantises: bool = False

    def format_of(self, name: str) -> Format:
        """The format of a canonical matrix: "embed", "head", "layers.3.attn.q"."""
        return {"embed": self.embedding, "head": self.head}.get(name.split(".")[0], self.projections)

    @property
    def written(self) -> Precision:
        """What the exporter's files hold: plain weights where the runtime's loader quantises."""
        return dataclasses.replace(self, projections=Format(self.arithmetic)) if self.loader_quantises else self

    @property
    def quantised(self) -> bool:
        """Whether the projections are stored in codes."""
        return not self.projections.plain

    def with_cache(self, cache: str) -> Precision:
        """The same with another type of stored keys and values; "auto" is that of the arithmetic."""
        return dataclasses.replace(self, cache=self.arithmetic if cache == "auto" else cache)

    def describe(self) -> dict[str, str]:
        """As a manifest keeps it; `from_description` reads it."""
        formats = {"projections": self.projections, "head": self.head, "embedding": self.embedding}
        if self.activations is not None:
            formats["activations"] = self.activations
        return {"arithmetic": self.arithmetic, "cache": self.cache} | {key: str(value) for key, value in formats.items()}

    @classmethod
    def from_description(cls, name: str, description: Mapping[str, str]) -> Precision:
        """The precision that `describe` gave. Raises UnsupportedError for one that cannot be read."""
        keys = {"arithmetic", "cache", "projections", "head", "embedding"}
        if not keys <= set(description) or not set(description) <= keys | {"activations"}:
            raise UnsupportedError("description of a precision", expected=", ".join(sorted(keys)), found=", ".join(description))
        if description["arithmetic"] not in ("float32", "float16", "bfloat16") or description["cache"] not in ITEM_BYTES:
            found = f"{description['arithmetic']}, {description['cache']}"
            raise UnsupportedError("types of a precision", expected=", ".join(ITEM_BYTES), found=found[:200])
        formats = {
            key: Format.parse(description[key])
            for key in ("projections", "head", "embedding", "activations")
            if key in description
        }
        return cls(name, description["arithmetic"], cache=description["cache"], **formats)  # type: ignore[arg-type]


def plain(name: str, dtype: Dtype) -> Precision:
    """Everything in one floating-point type."""
    one = Format(dtype)
    return Precision(name, dtype, one, one, one, dtype)


def _table(*precisions: Precision) -> Mapping[str, Precision]:
    return {precision.name: precision for precision in precisions}


_FLOAT16 = Format("float16")
_BLOCKS8, _BLOCKS4 = Format("int8", 32), Format("int4", 32)
_ROW8, _ROW4, _ROW_FLOAT8 = (Format(code, ROW, "float16") for code in ("int8", "int4", "float8_e4m3"))
# Everywhere: the head decides between close tokens, so it keeps 8 bits in int4 engines.
ONNX_RUNTIME = _table(
    plain("fp32", "float32"),
    plain("fp16", "float16"),
    Precision("int8", "float32", _BLOCKS8, _BLOCKS8, _FLOAT16, "float32", activations=_BLOCKS8),
    Precision("int4", "float32", _BLOCKS4, _BLOCKS8, _FLOAT16, "float32", activations=_BLOCKS8),
)
"""MatMulNBits computes in float32 and rounds its input to int8, in blocks as wide as those of the weights."""
TENSORRT = _table(
    plain("fp32", "float32"),
    plain("fp16", "float16"),
    plain("bf16", "bfloat16"),
    Precision("int8", "float16", _ROW8, _ROW8, _FLOAT16, "float16"),
    Precision("fp8", "float16", _ROW_FLOAT8, _ROW_FLOAT8, _FLOAT16, "float16"),
    Precision("int4", "float16", Format("int4", 32, "float16"), _ROW8, _FLOAT16, "float16"),
)
"""Weights are dequantised in the network. Unit-norm states fit float16, whose steps are 8 times finer than bfloat16's."""
TENSORRT_LLM = _table(
    plain("fp32", "float32"),
    plain("fp16", "float16"),
    plain("bf16", "bfloat16"),
    Precision("int8", "float16", _ROW8, _FLOAT16, _FLOAT16, "float16", loader_quantises=True),
    Precision("int4", "float16", _ROW4, _FLOAT16, _FLOAT16, "float16", loader_quantises=True),
    Precision("fp8", "float16", Format("float8_e4m3", WHOLE), _FLOAT16, _FLOAT16, "float16"),
)
"""Its loader quantises the projections, each row with one scale, and leaves the head alone. float8 has one scale a product."""
