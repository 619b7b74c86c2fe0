"""Per-tensor scales of FP8 products, from what nGPT guarantees instead of from calibration data.

A product's input is bounded before any token is seen: hidden states have unit norm, so no channel exceeds 1
(embeddings may be off by half a hundredth, which e4m3's rounding to 448 takes; by more only in a checkpoint that is
off the sphere, and then their norm is the bound); by Cauchy and Schwarz no channel of a projection exceeds the norm
of its row (and its bias); attention averages values. A scale of bound / 448 therefore never saturates e4m3, whose
relative precision does not suffer from the slack until values fall below 2**-6 / 448 of the bound.
"""

from __future__ import annotations

import numpy as np

from export.quantize import FLOAT8_LARGEST
from export.weights import Array, DeployedWeights
from ngpt.checkpoint.value_checks import OFF_SPHERE_LIMIT
from ngpt.errors import UnsupportedError


def weight_scale(weights: DeployedWeights, names: list[str]) -> float:
    """One scale for the canonical matrices `names`, which are one product; reads them one at a time."""
    largest = max(_largest(weights.get(name)) for name in names)
    return largest / FLOAT8_LARGEST if largest > 0 else 1.0


def activation_scale(weights: DeployedWeights, product: str) -> float:
    """Scale of the input of a canonical product such as `layers.0.attn.q`."""
    prefix, part = product.rsplit(".", 1)
    if part in ("q", "k", "v", "up", "gate"):
        # Rows of the embedding table may be off the unit sphere; what follows a layer never is.
        bound = max(1.0, _longest_row(weights.get("embed"))) if prefix == "layers.0.attn" else 1.0
    elif part == "o":
        bound = float(_row_bounds(weights, f"{prefix}.v").max())
    else:
        gated = weights.spec.gated
        inner = _row_bounds(weights, f"{prefix}.gate" if gated else f"{prefix}.up")
        inner = inner**2 if weights.spec.mlp == "relu2" else inner  # |f(u)| <= |u| for every other activation
        bound = float((inner * _row_bounds(weights, f"{prefix}.up") if gated else inner).max())
    if not np.isfinite(bound):
        raise UnsupportedError(f"range of the input of {product}", expected="finite weights", found=str(bound))
    return bound / FLOAT8_LARGEST if bound > 0 else 1.0


def cache_scale(weights: DeployedWeights, layer: int) -> float:
    """`kv_cache_scaling_factor` of a layer: what a cached code is multiplied by to give a key's or a value's channel.

    TensorRT-LLM has one for both (docs/source/advanced/gpt-attention.md, commit 5a211b91: shape [1], codes are value
    * (1 / scale)); its loader takes the larger of two (`preprocess_weights`, models/modeling_utils.py, commit
    34a26727). Keys are cached with unit norm, so no channel exceeds 1; values are bounded as the input of `o` is.
    That costs no precision, as long as the narrower of the two stays above 2**-6 / 448 of the wider: e4m3 is
    relative. Rounded weights or hidden states can exceed a bound by their own rounding; up to 464 / 448 of it that is
    e4m3's rounding too, and beyond it saturates.
    """
    return max(1.0 / FLOAT8_LARGEST, activation_scale(weights, f"layers.{layer}.attn.o"))


def _largest(matrix: Array) -> float:
    """Of the absolute values, without a copy."""
    return max(float(matrix.max()), -float(matrix.min()))


def _longest_row(matrix: Array) -> float:
    """The largest norm of a row; 1 where that is rounding."""
    longest = float(np.sqrt(np.einsum("ij,ij->i", matrix, matrix).max()))
    return longest if longest > 1 + OFF_SPHERE_LIMIT else 1.0


def _row_bounds(weights: DeployedWeights, product: str) -> Array:
    matrix = weights.get(f"{product}.weight")
    bounds: Array = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    if weights.has(f"{product}.bias"):
        bounds = bounds + np.abs(weights.get(f"{product}.bias"))
    return bounds
