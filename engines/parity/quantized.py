"""Quantisation as the parity check sees it: weights to put into the PyTorch model, and an independent audit of them.

The rounding itself is the exporter's (passed in as a function), so it must not be believed: `audit` checks, knowing
only bits and block size, that what came back is within one quantisation step of what went in. An exporter that
quantised badly would otherwise be compared with its own mistake.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.precision import CODE_BITS, Precision

RoundTrip = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]
"""(PyTorch name of a module, its weight [out, in] float32) -> the same, after a round trip through the engine's format."""

WHOLE_ROW = 0
"""As a block size: one block a row."""

_PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj|lm_head")


def every_projection(name: str) -> bool:
    """Attention and MLP projections and the head; never the embedding table. ``name`` is a PyTorch module name."""
    return _PROJECTION.fullmatch(name) is not None


@dataclass(frozen=True)
class Quantization:
    """How an engine is quantised: weights to ``bits`` in blocks of ``block_size``, and activations to int8 in blocks of
    ``activation_block``, or not (None).

    ``head_bits``, ``head_block``: of the language-model head, where they differ. ``narrow_embedding``: the embedding table is
    stored as float16. ``float8``: the codes are float8_e4m3fn instead of integers.
    """

    bits: int
    block_size: int
    round_trip: RoundTrip
    applies: Callable[[str], bool] = every_projection
    activation_block: int | None = None
    head_bits: int | None = None
    head_block: int | None = None
    narrow_embedding: bool = False
    float8: bool = False

    def bits_of(self, name: str) -> int:
        """Bits of one module's weight, by its PyTorch name."""
        return self.head_bits if name == "lm_head" and self.head_bits is not None else self.bits

    def block_of(self, name: str) -> int:
        """Block size of one module's weight, WHOLE_ROW for one block a row."""
        return self.head_block if name == "lm_head" and self.head_block is not None else self.block_size

    def describe(self) -> str:
        """In a few words, for the report."""
        kind = "float8" if self.float8 else f"int{self.bits}"
        return f"{kind}, " + ("one scale a row" if self.block_size == WHOLE_ROW else f"blocks of {self.block_size}")

    def blocks_and_step(self, name: str, weight: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The matrix in float64 blocks [N, blocks, size], zero padded, and what one step of the format is there.

        Integers: 2 max|w| / (2**bits - 1) of the block, the coarsest sensible step. float8_e4m3fn: 3 bits behind the leading one
        of each value, in units that put the block's largest at 448; below 2**-6 of those units steps no longer shrink.
        """
        size = self.block_of(name) or weight.shape[1]
        padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % size)))
        blocks = padded.reshape(len(weight), -1, size).astype(np.float64)
        largest = np.abs(blocks).max(-1, keepdims=True)
        if not self.float8:
            return blocks, 2 * largest / (2 ** self.bits_of(name) - 1)
        unit = np.where(largest > 0, largest, 1) / 448
        exponent = np.floor(np.log2(np.maximum(np.abs(blocks) / unit, 2.0**-6)))
        return blocks, 2.0 ** (exponent - 3) * unit


def quantization_of(precision: Precision) -> Quantization | None:
    """What a precision means for the check; None where its projections are plain.

    Bits, block and kind are read from its formats; what a step of them is, the check works out for itself.
    """
    if not precision.quantised:
        return None
    projections, head = precision.projections, precision.head

    def round_trip(name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        return (head if name == "lm_head" else projections).round_trip(weight)

    return Quantization(
        CODE_BITS[projections.code],
        max(projections.block or 0, WHOLE_ROW),
        round_trip,
        applies=every_projection if not head.plain else lambda name: name != "lm_head" and every_projection(name),
        activation_block=None if precision.activations is None else precision.activations.block,
        head_bits=CODE_BITS.get(head.code),
        head_block=head.block,
        narrow_embedding=precision.embedding.code == "float16",
        float8=projections.code == "float8_e4m3",
    )


@dataclass
class WeightAudit:
    """Worst results over all quantised matrices, in units of one quantisation step of the block."""

    worst_step: float = 0.0
    worst_rms: float = 0.0
    worst_name: str = ""
    matrices: int = 0
    names: list[str] = field(default_factory=list)


def put_quantized_weights(model: nn.Module, quantization: Quantization) -> WeightAudit:
    """Replace the weights of every module that the quantisation applies to, in place, and audit each one."""
    audit = WeightAudit()

    def rounded(name: str, before: NDArray[np.float32]) -> NDArray[np.float32]:
        after = quantization.round_trip(name, before)
        audit_weight(audit, name, before, after, quantization)
        return after

    _put_weights(model, quantization, rounded)
    return audit


def put_perturbed_weights(model: nn.Module, quantization: Quantization, seed: int) -> None:
    """Add to every quantised weight an error drawn evenly from half a step either side, in place.

    That is what rounding to nearest does to a weight, with the exporter's own rounding left out of it: the format's
    step alone decides how far this model is from the original.
    """
    random = np.random.default_rng(seed)

    def perturbed(name: str, before: NDArray[np.float32]) -> NDArray[np.float32]:
        blocks, step = quantization.blocks_and_step(name, before)
        moved = blocks + step * random.uniform(-0.5, 0.5, blocks.shape)
        return moved.reshape(len(before), -1)[:, : before.shape[1]].astype(np.float32)

    _put_weights(model, quantization, perturbed)


def _put_weights(
    model: nn.Module, quantization: Quantization, change: Callable[[str, NDArray[np.float32]], NDArray[np.float32]]
) -> None:
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not quantization.applies(name):
            continue
        before: NDArray[np.float32] = module.weight.detach().float().numpy()
        fresh = torch.from_numpy(np.array(change(name, before))).to(module.weight.dtype)
        if embedding is not None and module.weight is embedding.weight:
            module.weight = nn.Parameter(fresh)  # a tied head is quantised, the table that it shared is not
        else:
            module.weight.data.copy_(fresh)
    if quantization.narrow_embedding and embedding is not None:  # after the head, which may share the table
        embedding.weight.data.copy_(embedding.weight.half())


def audit_weight(
    audit: WeightAudit,
    name: str,
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    quantization: Quantization,
) -> None:
    """Measure |after - before| in steps of the format (`Quantization.blocks_and_step`).

    Rounding to nearest stays within one step (the extra half is for clipping at the asymmetric end of two's
    complement) and has an rms of about 0.29 steps.
    """
    old, step = quantization.blocks_and_step(name, before)
    new, _ = quantization.blocks_and_step(name, after)
    error = np.abs(new - old)
    steps = np.divide(error, step, out=np.where(error > 0, np.inf, 0.0), where=step > 0)
    worst, rms = float(steps.max()), float(np.sqrt(np.mean(steps**2)))
    audit.matrices += 1
    audit.names.append(name)
    if not worst <= audit.worst_step:
        audit.worst_step, audit.worst_name = worst, name
    audit.worst_rms = max(audit.worst_rms, rms)


def quantize_activations(model: nn.Module, quantization: Quantization) -> None:
    """Make every quantised module round its input to int8 in blocks of ``activation_block``, as integer kernels do."""
    block = quantization.activation_block
    assert block is not None  # who asks has looked

    def round_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_to_int8(inputs[0], block or inputs[0].shape[-1]), *inputs[1:])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and quantization.applies(name):
            module.register_forward_pre_hook(round_input)


def round_to_int8(x: Tensor, block_size: int) -> Tensor:
    """Symmetric int8 round trip of x [..., n] in blocks along the last axis."""
    width = x.shape[-1]
    blocks = nn.functional.pad(x, (0, -width % block_size)).unflatten(-1, (-1, block_size))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (blocks / scale).round(), 0.0) * scale
    return rounded.flatten(-2)[..., :width]
