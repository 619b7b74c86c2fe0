"""The two operations as PyTorch spells them, and as our kernels do, behind one interface for the decoder and the timings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from export.plugins.kernels import Dtype, HypersphereUpdate, Kernel, QKNorm

NAMES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Norms(Protocol):
    """h, x [..., E]; qk [B, S, (H + K) * D]; positions int32 [B, S]; lr, cos, sin and q_scale float32."""

    def update(self, h: Tensor, x: Tensor, lr: Tensor, eps: float) -> Tensor:
        """norm(h + lr * (norm(x, eps) - h)): [..., E]."""

    def qk(self, qk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, q_scale: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """q [B, H, S, D] and k [B, K, S, D]; the head size is len(q_scale) / heads."""


class TorchNorms:
    """Plain operations, in float32 inside: what `torch.compile` is given, too."""

    def update(self, h: Tensor, x: Tensor, lr: Tensor, eps: float) -> Tensor:
        wide = h.float()
        return _unit(torch.lerp(wide, _unit(x.float(), eps), lr), 0.0).to(h.dtype)

    def qk(self, qk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, q_scale: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        size, half = q_scale.shape[0] // heads, cos.shape[-1]
        wide = qk.float().view(*qk.shape[:-1], -1, size)
        c, s = (table[positions].unsqueeze(2) for table in (cos, sin))
        a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
        unit = _unit(torch.cat((a * c - b * s, b * c + a * s, rest), -1), 0.0)
        q = unit[:, :, :heads] * q_scale.view(heads, size)
        return q.to(qk.dtype).transpose(1, 2).contiguous(), unit[:, :, heads:].to(qk.dtype).transpose(1, 2).contiguous()


class KernelNorms:
    """Our kernels. `launch(kernel)` gives what runs one; a kernel is made once for each size it meets."""

    def __init__(self, launch: Callable[[Kernel], Callable[..., None]]) -> None:
        self._launch = launch
        self._ready: dict[Kernel, Callable[..., None]] = {}

    def _run(self, kernel: Kernel, count: int, *arguments: object) -> None:
        if kernel not in self._ready:
            self._ready[kernel] = self._launch(kernel)
        self._ready[kernel](count, *arguments)

    def update(self, h: Tensor, x: Tensor, lr: Tensor, eps: float) -> Tensor:
        kernel = HypersphereUpdate(h.shape[-1], eps, NAMES[h.dtype])
        rows, out = h.numel() // h.shape[-1], torch.empty_like(h)
        self._run(kernel, rows, h, x, lr, rows, out)
        return out

    def qk(self, qk: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, q_scale: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        size = q_scale.shape[0] // heads
        keys = qk.shape[-1] // size - heads
        kernel = QKNorm(heads, keys, size, 2 * cos.shape[-1], NAMES[qk.dtype])
        batch, sequence = positions.shape
        q, k = qk.new_empty((batch, heads, sequence, size)), qk.new_empty((batch, keys, sequence, size))
        tokens = batch * sequence
        self._run(kernel, tokens, qk, cos, sin, positions, q_scale, tokens, sequence, cos.shape[0], q, k)
        return q, k


def _unit(x: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + eps
    unit: Tensor = x / length.clamp_min(torch.finfo(x.dtype).tiny)
    return unit
