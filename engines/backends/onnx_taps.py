"""Values inside an ONNX engine: the file that is served, opened again with further outputs. Nothing of it is made anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.protocol import TapFunction
from engines.runtime.manifest import Manifest, contained_path
from export.taps import tap_names
from ngpt.errors import missing_package

_GRAPH = "tapped.onnx"
_MOST = 512 << 20  # bytes of all values of one sequence: beyond it the hidden states alone are taken


def tapped_graph(folder: Path, manifest: Manifest, scratch: Path) -> TapFunction:
    """Token ids [T] -> {tap name: float32 [T, n]} of the engine in `folder`, whose weights are shared by a link.

    Raises MissingPackageError without onnx, and what ONNX Runtime raises for a graph that it cannot load.
    """
    try:
        import onnx
    except ImportError as error:
        raise missing_package("looking inside an engine needs onnx", "onnx", found=str(error)) from error
    model = onnx.load(contained_path(folder, manifest.graph), load_external_data=False)
    made = {name for node in model.graph.node for name in node.output}
    shown = {value.name for value in model.graph.output}
    names = [name for name in tap_names(manifest.model.num_layers) if name in made]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in shown)
    # Beside the graph under the names that it knows them by; the runtime follows no symbolic link out of a model's folder.
    graph = scratch / PurePosixPath(manifest.graph).with_name(_GRAPH)
    graph.parent.mkdir(parents=True, exist_ok=True)
    for name in {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}:
        _share(contained_path(folder, str(PurePosixPath(manifest.graph).with_name(name))), graph.with_name(name))
    onnx.save(model, graph)
    return _function(graph, manifest, names)


def _function(graph: Path, manifest: Manifest, names: Sequence[str]) -> TapFunction:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=list(manifest.target.providers))
    empty: dict[str, NDArray[Any]] = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            kind = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
            empty[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), kind)
    coarse = [name for name in names if name in tap_names(manifest.model.num_layers, fine=False)]

    def fetch(ids: NDArray[np.int64], wanted: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        positions = np.arange(len(ids), dtype=np.int64)[None]
        feeds = empty | {"input_ids": ids[None], "attention_mask": np.ones_like(positions), "position_ids": positions}
        values = session.run(list(wanted), feeds)
        return {name: value.astype(np.float32).reshape(len(ids), -1) for name, value in zip(wanted, values, strict=True)}

    channels = sum(value.size for value in fetch(np.zeros(1, np.int64), names).values())

    def run(ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        return fetch(ids, names if 4 * channels * len(ids) <= _MOST else coarse)

    return run


def _share(source: Path, link: Path) -> None:
    """The same file under another name; a copy where they lie on different disks."""
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, link)
    except OSError:
        shutil.copyfile(source, link)
