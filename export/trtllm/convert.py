"""A checkpoint in TensorRT-LLM's format: config.json and one safetensors file a rank. One tensor is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from export.journal import Journal, Region
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
    journal: Journal | None = None,
) -> None:
    """Write config.json and rank{i}.safetensors into an existing folder.

    Each canonical tensor is read once (float8: twice, for its range) and its shares go to all files. Weights that
    TensorRT-LLM's loader quantises are written plain; float8 ones with a scale for each product. `kernels` as in
    `trtllm_config`; a cache of float8 adds one scale a layer, from whose inverse TensorRT-LLM's loader makes the
    other. `journal`: of a conversion that was killed; tensors that are complete are not converted again. Raises
    UnsupportedError for sizes that cannot be divided, activations TensorRT-LLM lacks, or weights beyond float16.
    """
    parallel.check(weights.spec)
    config = trtllm_config(weights, parallel, precision, kernels)
    stored: torch.dtype = getattr(torch, precision.arithmetic)
    codes = precision.quantised and not precision.loader_quantises
    matrix = torch.float8_e4m3fn if codes else stored
    dtypes = {"matrix": matrix, "stored": stored, "vector": torch.float32}
    layouts = [rank_layout(weights, parallel, rank) for rank in range(parallel.world)]
    scales = _Scales(weights) if codes else None
    layers = range(weights.spec.num_layers if precision.cache == "float8_e4m3" else 0)
    with ExitStack() as stack:
        files = []
        for rank, layout in enumerate(layouts):
            tensors = {name: (dtypes[entry.kind], entry.shape) for name, entry in layout.items()}
            if scales is not None:
                for name, entry in layout.items():
                    if entry.kind == "matrix":
                        tensors |= {scale: (torch.float32, (1,)) for scale in _scales_of(name)}
            mine = parallel.layers(rank // parallel.tp, weights.spec.num_layers) if layers else ()
            tensors |= {_CACHE_SCALE.format(local): (torch.float32, (1,)) for local in range(len(mine))}
            path = (folder if journal is None else journal.folder) / f"rank{rank}.safetensors"
            files.append(stack.enter_context(RankFile(path, tensors, kept=journal is not None)))
        unit = _Units(files, journal)
        for layer in layers:
            progress(f"scale of the cache of layer {layer}", 0.0)
            local = next((rank, mine.index(layer)) for rank, mine in _stages(parallel, len(layers)) if layer in mine)
            places = [(local[0] + rank, _CACHE_SCALE.format(local[1]), 0, 1) for rank in range(parallel.tp)]
            if not unit.complete(f"cache of layer {layer}", places):
                number = cache_scale(weights, layer)
                for rank, name, _, _ in places:
                    files[rank].write(name, 0, torch.tensor([number]))
                unit.record(f"cache of layer {layer}", places)
        wanted = _by_source(layouts)
        for done, source in enumerate(weights.names()):
            progress(f"converting {source}", done / len(weights.names()))
            scaled = scales is not None and wanted[source][0][2].kind == "matrix"
            rows = weights.shape(source)[0]
            places = [
                (rank, name, part.at, len(range(rows) if part.rows is None else part.rows))
                for rank, name, _, part in wanted[source]
            ]
            if scaled:
                places += [(rank, scale, 0, 1) for rank, name, _, _ in wanted[source] for scale in _scales_of(name)]
            if unit.complete(source, places):
                continue
            pair = scales.of(source) if scales is not None and scaled else None
            value = weights.get(source)  # after the scale, which reads tensors of its own
            for rank, name, entry, part in wanted[source]:
                _write(files[rank], name, part, value, dtypes[entry.kind], pair[0] if pair else 1.0, source)
                if pair is not None:
                    for scale, number in zip(_scales_of(name), pair, strict=True):
                        files[rank].write(scale, 0, torch.tensor([number]))
            del value
            unit.record(source, places)
    if journal is not None:
        for file in files:
            journal.hand_over(file.path.name, folder / file.path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _scales_of(name: str) -> tuple[str, ...]:
    """Names of the scales of a float8 matrix."""
    return tuple(f"{name.removesuffix('weight')}{kind}" for kind in _SCALES)


def _stages(parallel: Parallel, layers: int) -> list[tuple[int, range]]:
    """The first rank of each stage of the pipeline, and the stage's layers."""
    return [(stage * parallel.tp, parallel.layers(stage, layers)) for stage in range(parallel.pp)]


class _Units:
    """A journal of what lies in several rank files. A place is a rank, a tensor's name, a row and the number of rows."""

    def __init__(self, files: list[RankFile], journal: Journal | None) -> None:
        self._files, self._journal = files, journal

    def complete(self, unit: str, places: Iterable[tuple[int, str, int, int]]) -> bool:
        return self._journal is not None and self._journal.complete(unit, self._regions(places))

    def record(self, unit: str, places: Iterable[tuple[int, str, int, int]]) -> None:
        if self._journal is not None:
            for file in self._files:
                file.flush()
            self._journal.record(unit, self._regions(places))

    def _regions(self, places: Iterable[tuple[int, str, int, int]]) -> list[Region]:
        return [self._files[rank].region(name, at, rows) for rank, name, at, rows in places]


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
