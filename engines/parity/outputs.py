"""`Outputs`: what one run of one network on one token sequence produced, whoever ran it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Outputs:
    """``logits`` [T, V] for a sequence of T tokens; ``taps`` name -> unit-norm hidden states [T, E].

    Tap names are those of the whole project: ``embed``, ``layers.{i}.attn.update``, ``layers.{i}.mlp.update``.
    """

    logits: NDArray[np.floating]
    taps: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
