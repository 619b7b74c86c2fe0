"""What nGPT's training recipe adds to an ordinary loop (paper section 2.6): matrices go back to the hypersphere."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ngpt.errors import UnsupportedError
from ngpt.model import NGPTForCausalLM


def unit_matrices(model: NGPTForCausalLM) -> Iterator[tuple[Tensor, int]]:
    """Every matrix that lives on the hypersphere with the axis along which its vectors lie: 1 = rows, 0 = columns.

    Raises UnsupportedError for a model whose sz is folded: the norms of its head's rows are the scales.
    """
    if model.config.sz_folded:
        raise UnsupportedError("a checkpoint with folded scales cannot be trained", remedy="train the one it was folded from")
    yield model.model.embed_tokens.weight, 1
    if not model.config.tie_word_embeddings:
        yield model.lm_head.weight, 1
    layers: Any = model.model.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.up_proj, mlp.gate_proj):
            if linear is not None:
                yield linear.weight, 1
        yield attention.o_proj.weight, 0
        yield mlp.down_proj.weight, 0


@torch.no_grad()
def normalize_weights_(model: NGPTForCausalLM) -> None:
    """Return every matrix to unit-norm rows or columns, in place; call it after each optimiser step (section 2.6)."""
    for weight, axis in unit_matrices(model):
        length = torch.linalg.vector_norm(
            weight.double() if weight.device.type == "cpu" else weight.float(), dim=axis, keepdim=True
        )
        weight.div_(length.clamp_min(torch.finfo(torch.float32).tiny).to(weight.dtype))
