"""`open_checkpoint`: which format is at a path, and the Hugging Face folder's reader."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ngpt.checkpoint.base import Checkpoint
from ngpt.checkpoint.research import RESEARCH_FILE, ResearchSource
from ngpt.checkpoint.safetensors_file import SafetensorsReader, TensorInfo, read_json
from ngpt.errors import (
    CheckpointError,
    CorruptFileError,
    MissingTensorError,
    UnexpectedTensorError,
    UnsafeFormatError,
)

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_SHARDS = 4096


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face folder, a research ``ckpt.pt``, or a folder that contains one.

    Names, shapes and dtypes are checked here, from the files' headers; `Checkpoint.validate` checks values.
    Raises subclasses of `CheckpointError`, `ConfigError` or `UnsupportedError`.
    """
    path = Path(path)
    if path.suffix == ".bin":
        raise _refuse_bin(path)
    if path.is_file():
        if path.suffix == ".pt":
            return _open_research(path)
        raise CheckpointError(
            f"{path} is not a checkpoint",
            expected="a folder with config.json and safetensors, or a research ckpt.pt",
            found="a file",
            remedy="point at the folder" if path.suffix == ".safetensors" else "",
        )
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}", expected="a folder or a ckpt.pt", found="nothing")
    if (path / CONFIG_FILE).is_file():
        return _open_folder(path)
    if (path / RESEARCH_FILE).is_file():
        return _open_research(path / RESEARCH_FILE)
    raise CheckpointError(
        f"{path} holds no checkpoint",
        expected=f"{CONFIG_FILE} and {SINGLE_FILE}, or {RESEARCH_FILE}",
        found=", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "an empty folder",
    )


def _open_research(path: Path) -> Checkpoint:
    source = ResearchSource(path)
    return Checkpoint(path, source.config, source)


def _open_folder(path: Path) -> Checkpoint:
    config = read_json(path / CONFIG_FILE, limit=MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise CorruptFileError(f"{path / CONFIG_FILE}", expected="a JSON object", found=type(config).__name__)
    source = FolderSource(path)
    try:
        return Checkpoint(path, config, source)
    except BaseException:
        source.close()
        raise


class FolderSource:
    """Tensors of ``model.safetensors`` or of the shards that ``model.safetensors.index.json`` lists."""

    def __init__(self, folder: Path) -> None:
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.is_file() and index.is_file():
            raise CheckpointError(
                f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}",
                expected="one of them",
                found="both",
                remedy="remove the one that is stale",
            )
        self._owner: dict[str, SafetensorsReader] = {}
        if single.is_file():
            reader = SafetensorsReader(single)
            self._owner = dict.fromkeys(reader.infos, reader)
            self._readers = [reader]
        elif index.is_file():
            self._readers = self._open_shards(folder, _read_index(index))
        else:
            raise _no_weights(folder)
        self.infos: dict[str, TensorInfo] = {name: reader.infos[name] for name, reader in self._owner.items()}
        self.files = tuple(reader.path for reader in self._readers)

    def _open_shards(self, folder: Path, weight_map: dict[str, str]) -> list[SafetensorsReader]:
        readers = {}
        for file in sorted(set(weight_map.values())):
            if not (folder / file).is_file():
                raise MissingTensorError(
                    f"shard {file} is missing from {folder}",
                    expected=f"every file that {INDEX_FILE} names",
                    remedy="copy or download the shard",
                )
            readers[file] = SafetensorsReader(folder / file)
        for file, reader in readers.items():
            for name in reader.infos:
                if name in self._owner:
                    raise UnexpectedTensorError(
                        f"tensor {name!r} is stored twice",
                        found=f"in {self._owner[name].path.name} and in {file}",
                    )
                if weight_map.get(name) != file:
                    raise UnexpectedTensorError(
                        f"{file} holds {name!r}, which {INDEX_FILE} does not place there",
                        expected=weight_map.get(name, "no such tensor"),
                        found=file,
                    )
                self._owner[name] = reader
        absent = sorted(set(weight_map) - set(self._owner))
        if absent:
            raise MissingTensorError(
                f"{weight_map[absent[0]]} lacks {absent[0]!r}",
                expected=f"what {INDEX_FILE} says",
                found=f"{len(absent)} tensor(s) not in their shards",
            )
        return list(readers.values())

    def get(self, name: str) -> torch.Tensor:
        """The tensor in its storage dtype, mapped."""
        return self._owner[name].get(name)

    def close(self) -> None:
        """Close every shard."""
        for reader in self._readers:
            reader.close()


def _read_index(path: Path) -> dict[str, str]:
    index: Any = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{path}", expected="an object with a non-empty weight_map", found=repr(index)[:80])
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CorruptFileError(f"{path}: shard of {name!r}", expected="a file name", found=repr(file)[:80])
        if file.endswith(".bin"):
            raise _refuse_bin(path.parent / file)
        # Only a bare name can be a shard: no folder, no drive, no parent, nothing hidden.
        plain = file.endswith(".safetensors") and not file.startswith(".")
        if not plain or any(mark in file for mark in "/\\:\0") or len(file) > 255:
            raise UnsafeFormatError(
                f"{path.name} points {name!r} at an unsafe path",
                expected="the bare name of a .safetensors file in the same folder",
                found=repr(file)[:120],
                remedy="do not use this checkpoint unless you trust where it comes from",
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CorruptFileError(f"{path}", expected=f"at most {MAX_SHARDS} shards")
    return weight_map


def _refuse_bin(path: Path) -> UnsafeFormatError:
    return UnsafeFormatError(
        f"{path} is a pickle file, which can run code when loaded",
        expected="safetensors",
        found=path.name,
        remedy="convert it where you trust it: load it with PyTorch and save it with save_pretrained",
    )


def _no_weights(folder: Path) -> CheckpointError:
    bins = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.bin.index.json"))
    if bins:
        return _refuse_bin(bins[0])
    if (folder / "manifest.json").is_file():  # an engine's config.json is there for other tools
        return CheckpointError(
            f"{folder} is an engine", expected="a checkpoint", found="manifest.json and no weights of PyTorch's",
            remedy="give the checkpoint that the engine was built from",
        )  # fmt: skip
    return MissingTensorError(
        f"{folder} has a {CONFIG_FILE} but no weights",
        expected=f"{SINGLE_FILE} or {INDEX_FILE}",
        found="neither",
    )
