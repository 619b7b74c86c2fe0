"""A checkpoint's network as an ONNX graph on disk, and a second graph of it whose hidden states can be looked at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from engines.target import Target
from export.weights import DeployedWeights
from ngpt.checkpoint import Checkpoint
from ngpt.errors import missing_package
from ngpt.progress import Progress, silent
from ngpt.weights import Weights

# Protobuf ends at 2 GB, and a file that is mapped beats one that is parsed long before that.
EXTERNAL_DATA_FROM = 64 << 20
# The suffix under which transformers.js looks for the weights of a graph.
EXTERNAL_DATA_SUFFIX = "_data"


class Graph(NamedTuple):
    """What is to be known of a graph on disk: channels of a cached head (head_dim, or what the form's kernel pads it to), and
    whether the weights lie in a file of their own."""

    cache_channels: int
    external_data: bool


def export_graph(
    weights: DeployedWeights, target: Target, path: Path, progress: Progress = silent, taps: tuple[str, ...] = ()
) -> Graph:
    """Write the target's ONNX graph; tensors are read, folded, quantised and written one at a time.

    Raises MissingPackageError when the exporter's packages are not installed.
    """
    try:
        import onnx_ir as ir

        from export.lowerings.onnx import OnnxPortable, OnnxRuntime, Precision
        from export.network import define_network
    except ImportError as error:
        raise missing_package(f"exporting needs {error.name}", "onnx", found=str(error)) from error
    lowering = OnnxPortable if target.form == "portable" else OnnxRuntime
    lowered = lowering(weights, cast(Precision, target.precision), target.block_size)
    model = lowered.finish(define_network(lowered), taps)
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]

    def step(tensor: Any, info: Any) -> None:
        progress(f"writing {tensor.name}", info.index / max(info.total, 1))

    external_data = sum(sizes) >= EXTERNAL_DATA_FROM
    if not external_data:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=path.name + EXTERNAL_DATA_SUFFIX, size_threshold_bytes=1024, callback=step)
    return Graph(lowered.cache_channels, external_data)


def tap_function(
    checkpoint: Checkpoint, target: Target, scratch: Path
) -> Callable[[NDArray[np.int64]], dict[str, NDArray[np.float32]]]:
    """A second graph of the same lowering whose hidden states are outputs: ids [T] -> {tap name: float32 [T, E]}."""
    import onnxruntime

    spec = checkpoint.spec
    names = ("embed", *(f"layers.{i}.{part}.update" for i in range(spec.num_layers) for part in ("attn", "mlp")))
    weights = DeployedWeights(Weights(checkpoint), half_precision=target.precision == "fp16")
    graph = export_graph(weights, target, scratch / "taps.onnx", taps=names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(scratch / "taps.onnx"), options, providers=list(target.providers))
    dtype = np.float16 if target.precision == "fp16" else np.float32
    empty = np.zeros((1, spec.num_kv_heads, 0, graph.cache_channels), dtype)
    past = {f"past_key_values.{i}.{kind}": empty for i in range(spec.num_layers) for kind in ("key", "value")}

    def run(ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        positions = np.arange(len(ids), dtype=np.int64)[None]
        feeds = past | {"input_ids": ids[None], "attention_mask": np.ones_like(positions), "position_ids": positions}
        return {name: value[0].astype(np.float32) for name, value in zip(names, session.run(list(names), feeds), strict=True)}

    return run
