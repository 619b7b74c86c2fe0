"""A checkpoint whose vocabulary scales are folded into its head, for engines that apply `lm_head` themselves."""

from __future__ import annotations

from pathlib import Path

import torch

from ngpt.checkpoint.base import Checkpoint, Source
from ngpt.checkpoint.safetensors_file import TensorInfo
from ngpt.errors import UnsupportedError
from ngpt.tensor_names import EMBED, LM_HEAD, SZ

_BLOCK = 1 << 21  # float64 elements in flight while folding


def fold_scales(checkpoint: Checkpoint) -> Checkpoint:
    """The same network with lm_head.weight = lm_head.weight * sz * sz_init_value / r and without sz.weight.

    The product is taken in float64 and stored in float32 (float64 where the head was float64): narrower types would round
    the scales. Every other tensor keeps its values and dtype. A tied head becomes one of its own, because the embedding table
    must stay unit norm. The config gains ``sz_folded: true``; rows of such a head have the scales for norms, so a reader can
    check only that they are finite: this function therefore checks the original's values first. Files and digest are
    those of the original: write the result with `save_hf` and open that. Raises `UnsupportedError` when folded already,
    `TensorValueError`.
    """
    if checkpoint.spec.sz_folded:
        raise UnsupportedError(f"the scales of {checkpoint.path} are folded already", remedy="convert it without folding")
    checkpoint.validate()
    config = {**checkpoint.config, "sz_folded": True, "tie_word_embeddings": False}
    return Checkpoint(checkpoint.path, config, FoldedSource(checkpoint), text=checkpoint.text, off_sphere=checkpoint.off_sphere)


class FoldedSource(Source):
    """The tensors of a checkpoint, the head's scaled on reading."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._head = EMBED if checkpoint.spec.tied else LM_HEAD
        head = checkpoint.info(self._head)
        self._dtype = torch.float64 if head.dtype == "F64" else torch.float32
        self._infos = {name: checkpoint.info(name) for name in checkpoint.names() if name != SZ}
        self._infos[LM_HEAD] = TensorInfo("F64" if head.dtype == "F64" else "F32", head.shape)

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name to dtype and shape, without sz."""
        return self._infos

    @property
    def files(self) -> tuple[Path, ...]:
        """The original's files."""
        return self._checkpoint.files

    @property
    def places(self) -> dict[str, Path]:
        """None: the head is made on reading."""
        return {}

    def get(self, name: str) -> torch.Tensor:
        """The stored tensor, or the head with its rows scaled, folded a block of rows at a time."""
        if name != LM_HEAD:
            return self._checkpoint.get(name)
        table = self._checkpoint.get(self._head)
        scales = self._checkpoint.get(SZ).double() * self._checkpoint.spec.sz_scale
        out = torch.empty(table.shape, dtype=self._dtype)
        step = max(1, _BLOCK // table.shape[1])
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            out[rows] = table[rows].double() * scales[rows]
        return out

    def close(self) -> None:
        """Release the original's files."""
        self._checkpoint.close()
