"""Engines with a fault in their own graph, whose manifest nevertheless says that nothing was altered."""

import dataclasses
import shutil
from pathlib import Path

import onnx
from onnx import numpy_helper

from engines.runtime.manifest import describe_file, read_manifest, write_manifest


def break_engine(source: Path, output: Path, tensor: str, factor: float) -> Path:
    """A copy of an engine with one tensor of its graph multiplied, and without a verdict."""
    shutil.copytree(source, output)
    graph = onnx.load(output / "model.onnx")
    (found,) = [item for item in graph.graph.initializer if item.name == tensor]
    values = numpy_helper.to_array(found)
    found.CopyFrom(numpy_helper.from_array((values * values.dtype.type(factor)).astype(values.dtype), tensor))
    onnx.save(graph, output / "model.onnx")
    manifest = read_manifest(output)
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("parity.")}
    files["model.onnx"] = describe_file(output / "model.onnx")
    write_manifest(output, dataclasses.replace(manifest, files=files, parity=None))
    return output
