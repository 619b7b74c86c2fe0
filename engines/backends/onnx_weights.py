"""The quantised matrices that lie in an ONNX engine's own file, dequantised a few rows at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.protocol import StoredRows
from engines.runtime.manifest import Manifest, contained_path
from ngpt.errors import EngineError, missing_package

_NAME = re.compile(r"layers\.(\d+)\.(?:attn|mlp)\.(qkv|q|k|v|o|up|gate|down)")
_PARTS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
_PARTS |= {part: f"mlp.{part}_proj" for part in ("up", "gate", "down")}


@dataclass(frozen=True)
class _Matrix:
    """codes uint8 [N, blocks, bytes], scales and zero points [N, blocks]; `first`: where the module's own rows begin."""

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[np.uint8] | None
    bits: int
    columns: int
    first: int

    def rows(self, first: int, count: int) -> NDArray[np.float32]:
        at = slice(self.first + first, self.first + first + count)
        codes = _unpacked(np.asarray(self.codes[at]), self.bits)
        zero: Any = np.float32(1 << (self.bits - 1)) if self.zeros is None else self.zeros[at, :, None].astype(np.float32)
        values = (codes.astype(np.float32) - zero) * np.asarray(self.scales[at], np.float32)[:, :, None]
        dequantised: NDArray[np.float32] = values.reshape(len(values), -1)[:, : self.columns]
        return dequantised


def stored_rows(folder: Path, manifest: Manifest) -> StoredRows:
    """The matrices of the engine in `folder`; its weights' file is mapped, not read.

    Raises EngineError for a matrix that cannot be what it says, MissingPackageError without onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_package("looking inside an engine needs onnx", "onnx", found=str(error)) from error
    model = onnx.load(contained_path(folder, manifest.graph), load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    place = PurePosixPath(manifest.graph)

    def array(name: str) -> NDArray[Any]:
        tensor = tensors[name]
        where = {entry.key: entry.value for entry in tensor.external_data}
        if not where:
            found: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
            return found
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file = contained_path(folder, str(place.with_name(where["location"])))
        return np.memmap(file, kind, "r", offset=int(where.get("offset", 0)), shape=tuple(tensor.dims))

    heads = manifest.model.num_heads, manifest.model.num_kv_heads, manifest.model.num_kv_heads
    sizes = {part: count * manifest.model.head_dim for part, count in zip("qkv", heads, strict=True)}
    found: dict[str, _Matrix] = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        try:
            found |= _matrices(node, array, sizes)
        except (KeyError, ValueError, IndexError, OSError) as error:
            raise EngineError(f"the matrix {node.name[:100]!r} of the engine", found=str(error)[:200]) from error
    return lambda module, first, count: found[module].rows(first, count) if module in found else None


def _matrices(node: Any, array: Callable[[str], NDArray[Any]], sizes: Mapping[str, int]) -> dict[str, _Matrix]:
    """By module; the projections of q, k and v are one matrix."""
    about = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, bits, block = (about[key] for key in ("N", "K", "bits", "block_size"))
    blocks = -(-columns // block)
    codes = array(node.input[1]).reshape(rows, blocks, block * bits // 8)
    scales = array(node.input[2]).reshape(rows, blocks)
    zeros = None
    if len(node.input) > 3 and node.input[3]:
        zeros = _unpacked(array(node.input[3]).reshape(rows, -1), bits)[:, :blocks]
    name = node.input[1].removesuffix(".data")
    if name == "head":
        return {"lm_head": _Matrix(codes, scales, zeros, bits, columns, 0)}
    if (known := _NAME.fullmatch(name)) is None:
        return {}  # not one of ours: the matrix that it stands for is then missed
    layer, last = known.groups()
    found, first = {}, 0
    for part in "qkv" if last == "qkv" else (last,):
        found[f"model.layers.{layer}.{_PARTS[part]}"] = _Matrix(codes, scales, zeros, bits, columns, first)
        first += sizes.get(part, 0)
    return found


def _unpacked(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of 4 bits lie two in a byte, the low one first."""
    if bits == 8:
        return codes
    halves: NDArray[np.uint8] = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], -1)
    return halves
