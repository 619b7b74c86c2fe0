"""Writing a checkpoint as a Hugging Face folder: atomically, one shard in memory at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from ngpt.atomic_folder import new_folder
from ngpt.checkpoint.base import Checkpoint
from ngpt.checkpoint.huggingface import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from ngpt.errors import BuildError
from ngpt.progress import Progress, silent
from ngpt.remote_code import add_code

MAX_SHARD_BYTES = 2 << 30


def save_hf(
    checkpoint: Checkpoint,
    out_dir: str | os.PathLike[str],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    with_code: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write config.json, safetensors (sharded above ``max_shard_bytes``) and tokenizer files to a new folder.

    The folder appears complete or not at all. Values are copied bit for bit. Raises `OutputExistsError`,
    `BuildError` (disk full and other I/O failures).
    """
    target = Path(out_dir)
    needed = sum(checkpoint.info(name).nbytes for name in checkpoint.names())
    with new_folder(target, needed=needed, into_empty=True) as folder:
        try:
            _write(checkpoint, folder, max_shard_bytes, progress)
            if with_code:
                add_code(folder)
        except SafetensorError as error:  # the library's own spelling of a full disk
            raise BuildError(f"{target} cannot be written", found=str(error), remedy="see whether the disk is full") from error
    return target


def _write(checkpoint: Checkpoint, folder: Path, limit: int, progress: Progress) -> None:
    config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}  # the code it names is not copied
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    checkpoint.text.copy_to(folder)
    shards = _shards(checkpoint, limit)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        progress(f"writing {file_name}", (number - 1) / len(shards))
        # Views of shared storage (halves of c_fc) must become tensors of their own.
        tensors = {name: checkpoint.get(name).contiguous().clone() for name in names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file_name))
    if len(shards) > 1:
        total = sum(checkpoint.info(name).nbytes for name in checkpoint.names())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(checkpoint: Checkpoint, limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name in checkpoint.names():
        size = checkpoint.info(name).nbytes
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
