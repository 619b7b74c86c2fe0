"""ONNX graphs: the network in standard operators, or with ONNX Runtime's kernels, and what other tools need beside it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.backends.genai_config import genai_config
from engines.backends.hub_config import hub_config
from engines.backends.onnx_taps import tapped_graph
from engines.backends.onnx_weights import stored_rows
from engines.backends.protocol import Job, StoredRows, TapFunction, Written
from engines.memory import total_bytes
from engines.runtime.manifest import Manifest
from engines.runtimes import RUNTIMES
from engines.target import Target
from export.journal import Journal
from export.network import define_network
from export.precision import Precision
from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt.errors import missing_package
from ngpt.progress import Progress, silent
from ngpt.spec import NGPTSpec

GRAPH = "model.onnx"
# Protobuf ends at 2 GB, and a file that is mapped beats one that is parsed long before that.
EXTERNAL_DATA_FROM = 64 << 20
# The suffix under which transformers.js looks for the weights of a graph.
EXTERNAL_DATA_SUFFIX = "_data"
_SMALL_FILES = 16 << 20
_PACKAGES = ("onnx-ir", "onnxruntime")


class OnnxBackend:
    """Engines of ONNX Runtime."""

    runtime = RUNTIMES["onnxruntime"]

    def tools(self) -> Mapping[str, str]:
        _exporter()
        found = {}
        for package in _PACKAGES:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:  # onnxruntime-gpu goes by another name
                continue
        return found

    def check(self, spec: NGPTSpec, target: Target, parallel: Parallel) -> None:
        """Any size is taken."""

    def estimate(self, spec: NGPTSpec, target: Target, parallel: Parallel) -> int:
        return total_bytes(spec, target.precision) + _SMALL_FILES

    def write(self, job: Job, folder: Path, progress: Progress) -> Written:
        weights, target = job.weights, job.target
        graph = export_graph(weights, target.form, target.precision, folder / GRAPH, progress, journal=job.journal)
        for name, content in (
            ("genai_config.json", genai_config(job.spec, job.target, graph.cache_channels)),
            ("config.json", hub_config(job.spec, job.target, graph.cache_channels, graph.external_data)),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return Written(GRAPH, {"form": job.target.form})

    def taps(self, folder: Path, manifest: Manifest, precision: Precision, scratch: Path) -> TapFunction | None:
        return tapped_graph(folder, manifest, scratch)

    def stored(self, folder: Path, manifest: Manifest) -> StoredRows | None:
        return stored_rows(folder, manifest)

    def outline(self, job: Job, folder: Path) -> list[str]:
        return [f"write {folder / GRAPH}: {job.target.form} form, weights as {job.target.precision.projections}"]


@dataclass(frozen=True)
class Graph:
    """What is to be known of a graph on disk: channels of a cached head (head_dim, or what the form's kernel pads it to), and
    whether the weights lie in a file of their own."""

    cache_channels: int
    external_data: bool


def export_graph(
    weights: DeployedWeights,
    form: str,
    precision: Precision,
    path: Path,
    progress: Progress = silent,
    taps: tuple[str, ...] = (),
    journal: Journal | None = None,
) -> Graph:
    """Write an ONNX graph of form "ort" or "portable"; tensors are read, folded, quantised and written one at a time.

    `journal`: of a build that was killed; weights in a file of their own that are complete are not made again. Raises
    MissingPackageError when the exporter's packages are not installed.
    """
    ir, lowerings = _exporter()
    lowering = lowerings.OnnxPortable if form == "portable" else lowerings.OnnxRuntime
    lowered = lowering(weights, precision)
    model = lowered.finish(define_network(lowered), taps)
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]
    external_data = sum(sizes) >= EXTERNAL_DATA_FROM
    if not external_data:
        ir.save(model, path)
    else:
        lowerings.save_with_data(model, path, path.name + EXTERNAL_DATA_SUFFIX, progress, journal)
    return Graph(lowered.cache_channels, external_data)


def _exporter() -> tuple[Any, Any]:
    """(onnx_ir, the lowerings). Raises MissingPackageError."""
    try:
        import onnx_ir

        from export.lowerings import onnx
    except ImportError as error:
        raise missing_package(f"exporting needs {error.name}", "onnx", found=str(error)) from error
    return onnx_ir, onnx
