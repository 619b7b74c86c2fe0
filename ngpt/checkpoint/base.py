"""`Checkpoint`: one view of both input formats, in Hugging Face names."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import torch

from ngpt.checkpoint.safetensors_file import TensorInfo
from ngpt.checkpoint.value_checks import OFF_SPHERE_LIMIT, Deviation, check_values
from ngpt.config_keys import tidy
from ngpt.errors import DtypeError, MissingTensorError, ShapeError, TensorValueError, UnexpectedTensorError, shown
from ngpt.progress import Progress, silent
from ngpt.spec import NGPTSpec
from ngpt.tensor_names import FLOAT_DTYPES, LM_HEAD, expected_tensors
from ngpt.text_files import TextFiles

_CHUNK = 1 << 22
_LOG = logging.getLogger("ngpt")

OffSphere = Literal["refuse", "allow"]
"""What to do with a checkpoint whose vectors are far off the unit sphere: not read it, or take what the file says."""


class Source(Protocol):
    """Where tensors come from: names to infos, and the tensors themselves."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name to dtype and shape."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""

    @property
    def places(self) -> Mapping[str, Path]:
        """Name to the safetensors file that holds the tensor as `get` gives it; empty where tensors are made on reading."""

    def get(self, name: str) -> torch.Tensor:
        """The tensor in its storage dtype."""

    def close(self) -> None:
        """Release files."""


class Checkpoint:
    """An nGPT checkpoint whose names, shapes and dtypes have been checked; values are read lazily.

    ``config`` is the dict in Hugging Face form (for a research checkpoint, the equivalent one) without what
    `ngpt.config_keys.tidy` passes over, ``spec`` its meaning. ``notes`` says in sentences what was passed over and, after
    `validate`, what is unusual about the values; `report_notes` logs them. Use as a context manager, or call `close`, to
    release the memory map.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, Any],
        source: Source,
        *,
        text: TextFiles | None = None,
        off_sphere: OffSphere = "refuse",
    ) -> None:
        self.path = path
        self.off_sphere = off_sphere
        self.text = TextFiles() if text is None else text
        self.config, self.notes = tidy(config)
        self.spec = NGPTSpec.from_config(config)
        if text is not None:
            self.notes += text.notes
            self.spec = dataclasses.replace(self.spec, eos_token_ids=text.ends)
            if text.ends_given:
                self.config["eos_token_id"] = list(text.ends)
        self._source = source
        self._digest: str | None = None
        check_structure(self.spec, source.infos, str(path))

    def names(self) -> tuple[str, ...]:
        """Names of the stored tensors, in the order of the forward pass."""
        return tuple(name for name in expected_tensors(self.spec) if name in self._source.infos)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape without reading. Raises `MissingTensorError`."""
        if name not in self._source.infos:
            raise MissingTensorError(f"tensor {shown(name)} is not in {self.path}")
        return self._source.infos[name]

    def get(self, name: str) -> torch.Tensor:
        """The tensor in its storage dtype, memory-mapped where the format allows. Raises `MissingTensorError`."""
        self.info(name)
        return self._source.get(name)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        return self._source.files

    @property
    def places(self) -> Mapping[str, Path]:
        """Name to the safetensors file that holds the tensor as `get` gives it; empty where tensors are made on reading."""
        return self._source.places

    def digest(self) -> str:
        """ "sha256:..." over the bytes of the tensor files, in order of their names. Reads them once."""
        if self._digest is None:
            total = hashlib.sha256()
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                for part in pool.map(_sha256, sorted(self.files, key=lambda path: path.name)):
                    total.update(part)
            self._digest = "sha256:" + total.hexdigest()
        return self._digest

    def validate(self, progress: Progress = silent) -> None:
        """Check the tokenizer's ids, then read every tensor once: its values are finite, and matrices on the unit sphere.

        Vectors whose norm differs from 1 by more than the rounding of their storage dtype, but by no more than
        `OFF_SPHERE_LIMIT`, are noted; so are others where ``off_sphere`` is "allow". Raises `TensorValueError` naming the
        tensor, the row or column, and the tolerance.
        """
        self.text.check(self.spec.vocab_size)
        table = expected_tensors(self.spec)
        names = self.names()
        off: list[Deviation] = []
        for done, name in enumerate(names):
            progress(f"checking {name}", done / len(names))
            found = check_values(name, self.get(name), table[name])
            if found is not None:
                off.append(found)
        if off:
            self._judge(off)
        if self.spec.tied and LM_HEAD in names:
            self._check_tied()
        progress("checked", 1.0)

    def _judge(self, off: list[Deviation]) -> None:
        worst = max(off, key=lambda deviation: deviation.size)
        if worst.size > OFF_SPHERE_LIMIT and self.off_sphere != "allow":
            raise worst.error(len(off))
        note = f"off the unit sphere, used as they are: {len(off)} tensor(s), worst {worst}"
        self.notes = (*(n for n in self.notes if n != note), note)

    def report_notes(self) -> None:
        """Log every note as a warning of the logger "ngpt", one line each; without handlers Python prints them to stderr."""
        for note in self.notes:
            _LOG.warning("%s: %s", self.path, note)

    def _check_tied(self) -> None:
        if not torch.equal(self.get(LM_HEAD), self.get("model.embed_tokens.weight")):
            raise TensorValueError(
                f"{LM_HEAD} differs from model.embed_tokens.weight",
                expected="equal tensors, since tie_word_embeddings is true",
                remedy="set tie_word_embeddings to false, or remove lm_head.weight",
            )

    def close(self) -> None:
        """Release the files. Tensors already handed out stay valid."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _sha256(path: Path) -> bytes:
    part = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            part.update(chunk)
    return part.digest()


def check_structure(spec: NGPTSpec, infos: Mapping[str, TensorInfo], where: str) -> None:
    """Names, shapes and dtypes against the table. Raises the error class of the first problem, naming all of it."""
    table = expected_tensors(spec)
    missing = [name for name, expected in table.items() if expected.required and name not in infos]
    extra = sorted(set(infos) - set(table))
    if missing:
        raise MissingTensorError(
            f"{where} lacks {len(missing)} tensor(s): {_some(missing)}",
            expected=f"{len(table)} tensors as config.json describes",
            found=f"{len(infos)}" + (f", among them unexpected {_some(extra)}" if extra else ""),
            remedy="set tie_word_embeddings to true if the head shares the embedding table"
            if missing == [LM_HEAD]
            else "complete the checkpoint, or correct config.json",
        )
    if extra:
        raise UnexpectedTensorError(
            f"{where} holds {len(extra)} tensor(s) that config.json does not describe: {_some(extra)}",
            expected=f"{len(table)} tensors",
            found=f"{len(infos)}",
            remedy="remove them, or correct config.json",
        )
    for name, info in infos.items():
        if info.shape != table[name].shape:
            raise ShapeError(
                f"tensor {shown(name)} in {where} has the wrong shape",
                expected=str(list(table[name].shape)),
                found=shown(list(info.shape)),
                remedy="correct the sizes in config.json, or the checkpoint",
            )
        if info.dtype not in FLOAT_DTYPES:
            raise DtypeError(
                f"tensor {shown(name)} in {where} has an unusable dtype",
                expected="one of " + ", ".join(FLOAT_DTYPES),
                found=info.dtype,
                remedy="save the weights as float32, float16 or bfloat16",
            )


def _some(names: list[str]) -> str:
    return ", ".join(shown(name)[1:-1] for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
