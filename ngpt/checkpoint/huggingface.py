"""The weights of a Hugging Face folder: one safetensors file, or the shards that an index lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ngpt.checkpoint.safetensors_file import SafetensorsReader, TensorInfo
from ngpt.errors import CheckpointError, CorruptFileError, MissingTensorError, UnexpectedTensorError, UnsafeFormatError, shown
from ngpt.files import contained, exists, read_json

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 4096
ADAPTER = "adapter_config.json"
MERGE_FIRST = (
    "this is an adapter: merge it into its model with peft (merge_and_unload, then save_pretrained) and point at what that wrote"
)


class FolderSource:
    """Tensors of ``model.safetensors`` or of the shards that ``model.safetensors.index.json`` lists."""

    def __init__(self, folder: Path) -> None:
        single, index = exists(folder, SINGLE_FILE), exists(folder, INDEX_FILE)
        if single and index:
            raise CheckpointError(
                f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}",
                expected="one of them",
                found="both",
                remedy="remove the one that is stale",
            )
        self._owner: dict[str, SafetensorsReader] = {}
        if single:
            reader = SafetensorsReader(contained(folder, SINGLE_FILE))
            self._owner = dict.fromkeys(reader.infos, reader)
            self._readers = [reader]
        elif index:
            self._readers = self._open_shards(folder, _read_index(contained(folder, INDEX_FILE)))
        else:
            raise _no_weights(folder)
        self.infos: dict[str, TensorInfo] = {name: reader.infos[name] for name, reader in self._owner.items()}
        self.files = tuple(reader.path for reader in self._readers)
        self.places = {name: reader.path for name, reader in self._owner.items()}

    def _open_shards(self, folder: Path, weight_map: dict[str, str]) -> list[SafetensorsReader]:
        readers = {}
        for file in sorted(set(weight_map.values())):
            if not exists(folder, file):
                raise MissingTensorError(
                    f"shard {file[:255]} is missing from {folder}",
                    expected=f"every file that {INDEX_FILE} names",
                    remedy="copy or download the shard",
                )
            readers[file] = SafetensorsReader(contained(folder, file))
        for file, reader in readers.items():
            for name in reader.infos:
                if name in self._owner:
                    raise UnexpectedTensorError(
                        f"tensor {shown(name)} is stored twice",
                        found=f"in {self._owner[name].path.name} and in {file}",
                    )
                if weight_map.get(name) != file:
                    raise UnexpectedTensorError(
                        f"{file} holds {shown(name)}, which {INDEX_FILE} does not place there",
                        expected=weight_map.get(name, "no such tensor"),
                        found=file,
                    )
                self._owner[name] = reader
        absent = sorted(set(weight_map) - set(self._owner))
        if absent:
            raise MissingTensorError(
                f"{weight_map[absent[0]]} lacks {shown(absent[0])}",
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
        raise CorruptFileError(f"{path}", expected="an object with a non-empty weight_map", found=shown(index))
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CorruptFileError(f"{path}: shard of {shown(name)}", expected="a file name", found=shown(file))
        if file.endswith(".bin"):
            raise pickle_error(path.parent / file)
        # Only a bare name can be a shard: no folder, no drive, no parent, nothing hidden.
        plain = file.endswith(".safetensors") and not file.startswith(".")
        if not plain or any(mark in file for mark in "/\\:") or len(file) > 255 or not file.isprintable():
            raise UnsafeFormatError(
                f"{path.name} points {shown(name)} at an unsafe path",
                expected="the bare name of a .safetensors file in the same folder",
                found=shown(file),
                remedy="do not use this checkpoint unless you trust where it comes from",
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise CorruptFileError(f"{path}", expected=f"at most {MAX_SHARDS} shards")
    return weight_map


def pickle_error(path: Path) -> UnsafeFormatError:
    """Of a file in PyTorch's old format."""
    return UnsafeFormatError(
        f"{path} is a pickle file, which can run code when loaded",
        expected="safetensors",
        found=path.name,
        remedy="convert it where you trust it: load it with PyTorch and save it with save_pretrained",
    )


def _no_weights(folder: Path) -> CheckpointError:
    bins = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.bin.index.json"))
    if bins:
        return pickle_error(bins[0])
    others = sorted(entry.name for entry in folder.iterdir() if entry.name != CONFIG_FILE)
    return MissingTensorError(
        f"{folder} has a {CONFIG_FILE} but no weights",
        expected=f"{SINGLE_FILE} or {INDEX_FILE}",
        found=", ".join(shown(name)[1:-1] for name in others[:8]) or "neither",
        remedy=MERGE_FIRST if ADAPTER in others else "copy or download the weights to it",
    )
