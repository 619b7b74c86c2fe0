"""A graph whose weights lie in a file of their own, written tensor by tensor, and continued where a killed process stopped."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from export.journal import Journal, Region
from ngpt.progress import Progress

_SMALLEST = 1024
"""Bytes from which a tensor goes to the data file."""


def save_with_data(model: ir.Model, path: Path, data: str, progress: Progress, journal: Journal | None = None) -> None:
    """Write the graph to `path` and its weights to the file `data` beside it, one after the other, none held longer than it
    is written. The model's weights are afterwards those of the file.

    `journal`: weights that it knows as complete are neither made nor written again.
    """
    weights = [(value, value.const_value) for value in model.graph.initializers.values()]
    large = [(value, tensor) for value, tensor in weights if tensor is not None and tensor.nbytes >= _SMALLEST]
    folder = path.parent if journal is None else journal.folder
    target, offset = folder / data, 0
    with target.open("r+b" if target.is_file() else "wb") as file:
        for index, (value, tensor) in enumerate(large):
            name, length = str(value.name), tensor.nbytes
            region: Region = (data, offset, length)
            progress(f"writing {name}", index / len(large))
            if journal is None or not journal.complete(name, [region]):
                file.seek(offset)
                tensor.tofile(file)
                if journal is not None:
                    file.flush()
                    journal.record(name, [region])
            value.const_value = ir.ExternalTensor(
                data, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape), name=name, base_dir=folder
            )
            offset += length
        file.truncate(offset)
    if journal is not None:
        journal.hand_over(data, path.with_name(data))
    ir.save(model, path)
