"""`open_checkpoint`: which format is at a path, and the Hugging Face folder's reader."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ngpt.checkpoint.base import Checkpoint, OffSphere
from ngpt.checkpoint.research import RESEARCH_FILE, ResearchSource
from ngpt.checkpoint.safetensors_file import SafetensorsReader, TensorInfo
from ngpt.errors import (
    CheckpointError,
    CorruptFileError,
    MissingTensorError,
    UnexpectedTensorError,
    UnsafeFormatError,
    shown,
)
from ngpt.files import MAX_CONFIG_BYTES, check_content, contained, exists, kind_of, not_there, read_json
from ngpt.spec import NGPTSpec
from ngpt.text_files import End, find_text_files

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 4096
_ADAPTER = "adapter_config.json"
_MERGE = (
    "this is an adapter: merge it into its model with peft (merge_and_unload, then save_pretrained) and point at what that wrote"
)


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    off_sphere: OffSphere = "refuse",
    tokenizer: str | os.PathLike[str] | None = None,
    eos: Sequence[End] = (),
) -> Checkpoint:
    """Open a Hugging Face folder, a research ``ckpt.pt``, or a folder that contains one.

    Names, shapes and dtypes are checked here, from the files' headers; `Checkpoint.validate` checks values, and ``off_sphere``
    is what it does about vectors far from unit norm. ``tokenizer``: a folder or a tokenizer.json to take in place of the checkpoint's;
    ``eos``: the tokens that end a text, ids or the tokenizer's texts, in place of those that the checkpoint's files name.
    Raises subclasses of `CheckpointError`, `ConfigError` or `UnsupportedError`.
    """
    path, given = Path(path), os.fspath(path)
    try:
        return _open(path, given, Options(off_sphere, tokenizer, tuple(eos)))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}", found=error.strerror or str(error), remedy="check its permissions"
        ) from error


@dataclass(frozen=True)
class Options:
    """What `open_checkpoint` was told."""

    off_sphere: OffSphere
    tokenizer: str | os.PathLike[str] | None
    eos: tuple[End, ...]


def _open(path: Path, given: str, options: Options) -> Checkpoint:
    kind = kind_of(path)
    if path.suffix == ".bin" and kind != "folder":
        raise _refuse_bin(path)
    if kind == "nothing":
        raise not_there(path, given)
    if kind == "file":
        check_content(path)
        if path.suffix == ".pt":
            return _open_research(path, options)
        raise CheckpointError(
            f"{path} is not a checkpoint",
            expected="a folder with config.json and safetensors, or a research ckpt.pt",
            found="a file",
            remedy="point at the folder" if path.suffix in (".safetensors", ".json") else "rename it to ckpt.pt if it is one",
        )
    if kind != "folder":
        raise CheckpointError(f"{path} is not a checkpoint", expected="a folder or a ckpt.pt", found=kind)
    if exists(path, "manifest.json") and not (exists(path, SINGLE_FILE) or exists(path, INDEX_FILE)):
        raise CheckpointError(  # its config.json is there for other tools
            f"{path} is an engine", expected="a checkpoint", found="manifest.json and no weights of PyTorch's",
            remedy="give the checkpoint that the engine was built from",
        )  # fmt: skip
    if exists(path, CONFIG_FILE):
        return _open_folder(path, options)
    if exists(path, RESEARCH_FILE):
        return _open_research(contained(path, RESEARCH_FILE), options)
    inside = sorted(entry.name for entry in path.iterdir())
    snapshots = sorted((path / "snapshots").glob("*")) if "snapshots" in inside else []
    raise CheckpointError(
        f"{path} holds no checkpoint",
        expected=f"{CONFIG_FILE} and {SINGLE_FILE}, or {RESEARCH_FILE}",
        found=", ".join(shown(name)[1:-1] for name in inside[:8]) or "an empty folder",
        remedy=f"this is a folder of the Hugging Face cache: point at {snapshots[-1]}"
        if snapshots
        else _MERGE
        if _ADAPTER in inside
        else "see whether the path is right",
    )


def _open_research(path: Path, options: Options) -> Checkpoint:
    source = ResearchSource(path)
    text = find_text_files(path.parent, options.tokenizer)
    text.settle((), source.config["vocab_size"], ends=options.eos, from_tokenizer=True)
    return Checkpoint(path, source.config, source, text=text, off_sphere=options.off_sphere)


def _open_folder(path: Path, options: Options) -> Checkpoint:
    config_file = contained(path, CONFIG_FILE)
    config = read_json(config_file, limit=MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise CorruptFileError(f"{config_file}", expected="a JSON object", found=type(config).__name__)
    spec = NGPTSpec.from_config(config)  # what it is, before what it lacks
    source = FolderSource(path)
    try:
        text = find_text_files(path, options.tokenizer)
        text.settle(spec.eos_token_ids, spec.vocab_size, ends=options.eos)
        return Checkpoint(path, config, source, text=text, off_sphere=options.off_sphere)
    except BaseException:
        source.close()
        raise


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
            raise _refuse_bin(path.parent / file)
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
    others = sorted(entry.name for entry in folder.iterdir() if entry.name != CONFIG_FILE)
    return MissingTensorError(
        f"{folder} has a {CONFIG_FILE} but no weights",
        expected=f"{SINGLE_FILE} or {INDEX_FILE}",
        found=", ".join(shown(name)[1:-1] for name in others[:8]) or "neither",
        remedy=_MERGE if _ADAPTER in others else "copy or download the weights to it",
    )
