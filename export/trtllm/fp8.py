"""Per-tensor scales of FP8 products, from what nGPT guarantees instead of from calibration data.

A product's input is bounded before any token is seen: hidden states have unit norm, so no channel exceeds 1; by Cauchy and Schwarz no
channel of a projection exceeds the norm of its row (and its bias); attention averages values. A scale of bound / 448 therefore never
saturates e4m3, whose relative precision does not suffer from the slack until values fall below 2**-6 / 448 of the bound.
"""

from __future__ import annotations

import numpy as np

from export.weights import Array, DeployedWeights
from ngpt.errors import UnsupportedError

LARGEST = 448.0
"""Of float8_e4m3fn."""


def weight_scale(weights: DeployedWeights, names: list[str]) -> float:
    """One scale for the canonical matrices `names`, which are one product; reads them one at a time."""
    largest = max(_largest(weights.get(name)) for name in names)
    return largest / LARGEST if largest > 0 else 1.0


def activation_scale(weights: DeployedWeights, product: str) -> float:
    """Scale of the input of a canonical product such as `layers.0.attn.q`."""
    prefix, part = product.rsplit(".", 1)
    if part in ("q", "k", "v", "up", "gate"):
        bound = 1.0
    elif part == "o":
        bound = float(_row_bounds(weights, f"{prefix}.v").max())
    else:
        gated = weights.spec.gated
        inner = _row_bounds(weights, f"{prefix}.gate" if gated else f"{prefix}.up")
        inner = inner**2 if weights.spec.mlp == "relu2" else inner  # |f(u)| <= |u| for every other activation
        bound = float((inner * _row_bounds(weights, f"{prefix}.up") if gated else inner).max())
    if not np.isfinite(bound):
        raise UnsupportedError(f"range of the input of {product}", expected="finite weights", found=str(bound))
    return bound / LARGEST if bound > 0 else 1.0


def _largest(matrix: Array) -> float:
    """Of the absolute values, without a copy."""
    return max(float(matrix.max()), -float(matrix.min()))


def _row_bounds(weights: DeployedWeights, product: str) -> Array:
    matrix = weights.get(f"{product}.weight")
    bounds: Array = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    if weights.has(f"{product}.bias"):
        bounds = bounds + np.abs(weights.get(f"{product}.bias"))
    return bounds
