"""A checkpoint in TensorRT-LLM's format: config.json and one safetensors file a rank. One tensor is in memory at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from export.precision import Precision
from export.quantize import FLOAT8_LARGEST
from export.trtllm.config import trtllm_config
from export.trtllm.fp8 import activation_scale, cache_scale, weight_scale
from export.trtllm.layout import PLACES, Entry, Part, rank_layout
from export.trtllm.parallel import Parallel
from export.trtllm.rank_file import RankFile
from export.weights import Array, DeployedWeights
from ngpt.errors import UnsupportedError
from ngpt.progress import Progress, silent
from ngpt.tensor_names import Name

_BLOCK = 1 << 22  # elements rounded at once
_SCALES = ("weights_scaling_factor", "activation_scaling_factor")
_CACHE_SCALE = "transformer.layers.{}.attention.kv_cache_scaling_factor"


def convert(
    weights: DeployedWeights,
    folder: Path,
    parallel: Parallel,
    precision: Precision,
    progress: Progress = silent,
    *,
    kernels: int | None = None,
) -> None:
    """Write config.json and rank{i}.safetensors into an existing folder.

    Each canonical tensor is read once (float8: twice, for its range) and its shares go to all files. Weights that
    TensorRT-LLM's loader quantises are written plain; float8 ones with a scale for each product. `kernels` as in
    `trtllm_config`; a cache of float8 adds one scale a layer, from whose inverse TensorRT-LLM's loader makes the
    other. Raises UnsupportedError for sizes that cannot be divided, activations TensorRT-LLM lacks, or weights beyond
    float16.
    """
    parallel.check(weights.spec)
    config = trtllm_config(weights, parallel, precision, kernels)
    stored: torch.dtype = getattr(torch, precision.arithmetic)
    codes = precision.quantised and not precision.loader_quantises
    matrix = torch.float8_e4m3fn if codes else stored
    dtypes = {"matrix": matrix, "stored": stored, "vector": torch.float32}
    layouts = [rank_layout(weights, parallel, rank) for rank in range(parallel.world)]
    scales = _Scales(weights) if codes else None
    layers = weights.spec.num_layers
    caches = [cache_scale(weights, layer) for layer in range(layers)] if precision.cache == "float8_e4m3" else []
    with ExitStack() as stack:
        files = []
        for rank, layout in enumerate(layouts):
            tensors = {name: (dtypes[entry.kind], entry.shape) for name, entry in layout.items()}
            if scales is not None:
                for name, entry in layout.items():
                    if entry.kind == "matrix":
                        tensors |= {f"{name.removesuffix('weight')}{kind}": (torch.float32, (1,)) for kind in _SCALES}
            mine = caches and [caches[layer] for layer in parallel.layers(rank // parallel.tp, layers)]
            tensors |= {_CACHE_SCALE.format(local): (torch.float32, (1,)) for local in range(len(mine))}
            files.append(stack.enter_context(RankFile(folder / f"rank{rank}.safetensors", tensors)))
            for local, number in enumerate(mine):
                files[rank].write(_CACHE_SCALE.format(local), 0, torch.tensor([number]))
        wanted = _by_source(layouts)
        for done, source in enumerate(weights.names()):
            progress(f"converting {source}", done / len(weights.names()))
            is_matrix = wanted[source][0][2].kind == "matrix"
            scale = scales.of(source) if scales is not None and is_matrix else None
            value = weights.get(source)  # after the scale, which reads tensors of its own
            for rank, name, entry, part in wanted[source]:
                _write(files[rank], name, part, value, dtypes[entry.kind], scale[0] if scale else 1.0, source)
                if scale is not None:
                    for kind, number in zip(_SCALES, scale, strict=True):
                        files[rank].write(f"{name.removesuffix('weight')}{kind}", 0, torch.tensor([number]))
            del value
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class _Scales:
    """(weight scale, activation scale) of the product that a canonical matrix is part of; those of q, k and v are the same."""

    def __init__(self, weights: DeployedWeights) -> None:
        self._weights = weights
        self._known: dict[str, tuple[float, float]] = {}

    def of(self, source: str) -> tuple[float, float]:
        number, part, _ = Name.of(source)
        layer, module = f"layers.{number}", PLACES[part].module
        key = f"{layer}.{module}"
        if key not in self._known:
            names = [f"{layer}.{other}.weight" for other, place in PLACES.items() if place.module == module]
            self._known[key] = weight_scale(self._weights, names), activation_scale(self._weights, f"{layer}.{part}")
        return self._known[key]


def _by_source(layouts: list[dict[str, Entry]]) -> dict[str, list[tuple[int, str, Entry, Part]]]:
    wanted: dict[str, list[tuple[int, str, Entry, Part]]] = {}
    for rank, layout in enumerate(layouts):
        for name, entry in layout.items():
            for part in entry.parts:
                wanted.setdefault(part.source, []).append((rank, name, entry, part))
    return wanted


def _write(file: RankFile, name: str, part: Part, value: Array, dtype: torch.dtype, scale: float, source: str) -> None:
    """Round the part to its type and store it, a block of rows at a time."""
    rows = part.rows if part.rows is not None else range(len(value))
    columns = slice(None) if part.columns is None else slice(part.columns.start, part.columns.stop)
    step = max(1, _BLOCK // max(1, int(np.prod(value.shape[1:]))))
    for start in range(rows.start, rows.stop, step):
        block = torch.from_numpy(value[start : min(start + step, rows.stop)])
        block = block[:, columns] if block.ndim > 1 else block
        if dtype == torch.float8_e4m3fn:
            block = (block / scale).clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST)
        rounded = block.to(dtype)
        if dtype == torch.float16 and not bool(torch.isfinite(rounded).all()):
            raise UnsupportedError(
                f"weight {source} in float16",
                expected="values up to 65504",
                found=f"{float(block.abs().max()):.3g}",
                remedy="choose --precision bf16",
            )
        file.write(name, part.at + start - rows.start, rounded)
