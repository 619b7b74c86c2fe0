"""`open_checkpoint`: which format is at a path, and what to say where there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.checkpoint.base import Checkpoint, OffSphere
from ngpt.checkpoint.huggingface import (
    ADAPTER,
    CONFIG_FILE,
    INDEX_FILE,
    MERGE_FIRST,
    SINGLE_FILE,
    FolderSource,
    pickle_error,
)
from ngpt.checkpoint.research import RESEARCH_FILE, ResearchSource
from ngpt.errors import CheckpointError, CorruptFileError, shown
from ngpt.files import MAX_CONFIG_BYTES, check_content, contained, exists, kind_of, not_there, read_json
from ngpt.spec import NGPTSpec
from ngpt.text_files import End, find_text_files


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    off_sphere: OffSphere = "refuse",
    tokenizer: str | os.PathLike[str] | None = None,
    eos: Sequence[End] = (),
) -> Checkpoint:
    """Open a Hugging Face folder, a research ``ckpt.pt``, or a folder that contains one.

    Names, shapes and dtypes are checked here, from the files' headers; `Checkpoint.validate` checks values, and ``off_sphere``
    is what it does about vectors far from unit norm. ``tokenizer``: a folder or a tokenizer.json to take in place of
    the checkpoint's; ``eos``: the tokens that end a text, ids or the tokenizer's texts, in place of those that the
    checkpoint's files name.
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
        raise pickle_error(path)
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
            f"{path} is an engine",
            expected="a checkpoint",
            found="manifest.json and no weights of PyTorch's",
            remedy="give the checkpoint that the engine was built from",
        )
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
        else MERGE_FIRST
        if ADAPTER in inside
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
