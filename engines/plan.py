"""A checkpoint's network as a TensorRT plan for one card: network, optimisation profiles, build.

tensorrt_rtx builds without a GPU, which the tests do; plans of `tensorrt` (form "plugins") are contract-tested, not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.target import Profile, Target
from export.lowerings.spool import Spool
from export.lowerings.tensorrt import TensorRT
from export.lowerings.tensorrt_library import Library
from export.network import define_network
from export.weights import DeployedWeights
from ngpt.progress import Progress, silent
from ngpt.spec import NGPTSpec

PREFILL, DECODE = 0, 1
"""Indices of the two optimisation profiles."""


def build_plan(
    weights: DeployedWeights,
    target: Target,
    library: Library,
    path: Path,
    *,
    taps: Sequence[str] = (),
    progress: Progress = silent,
) -> int:
    """Define and build the target's plan into `path`; returns its bytes.

    Weights are read, folded and rounded one at a time into a scratch file beside `path`, which the library reads while it
    builds. Raises BuildError with the library's reason, UnsupportedError for what this library or card lacks.
    """
    assert target.gpu is not None and target.profile is not None
    builder, network = library.create_network()
    with Spool(path.parent) as spool:
        architecture = int(target.gpu.compute_capability.replace(".", "") or 80)
        lowered = lowering(target)(weights, library, network, spool, target.precision, progress, architecture)
        lowered.finish(define_network(lowered), taps)
        config = builder.create_builder_config()
        for index in (PREFILL, DECODE):
            config.add_optimization_profile(_profile(builder, weights.spec, library, target.profile, index))
        if library.name == "tensorrt_rtx" and target.gpu.compute_capability:  # TensorRT builds for the card it finds
            config.num_compute_capabilities = 1
            config.set_compute_capability(library.compute_capability(target.gpu.compute_capability), 0)
        library.check("the build configuration")
        return library.build(builder, network, config, path, progress)


def lowering(target: Target) -> type[TensorRT]:
    """The class that defines the network of a target's form."""
    if target.form != "plugins":
        return TensorRT
    from export.lowerings.tensorrt_plugins import TensorRTPlugins

    return TensorRTPlugins


def _profile(builder: Any, spec: NGPTSpec, library: Library, sizes: Profile, index: int) -> Any:
    """PREFILL: one sequence, up to prefill_tokens tokens, any of their logits. DECODE: up to decode_batch sequences, one token."""
    batch, tokens = (1, sizes.prefill_tokens) if index == PREFILL else (sizes.decode_batch, 1)
    profile = builder.create_optimization_profile()

    def shapes(name: str, low: tuple[int, ...], usual: tuple[int, ...], high: tuple[int, ...]) -> None:
        profile.set_shape(name, low, usual, high)
        library.check(f"the shapes of {name}")

    for name in ("input_ids", "position_ids"):
        shapes(name, (1, 1), (batch, tokens), (batch, tokens))
    for name in ("write_at", "lengths"):
        shapes(name, (1,), (batch,), (batch,))
    shapes("logit_rows", (1,), (1,) if index == PREFILL else (batch,), (max(batch, tokens),))
    for layer in range(spec.num_layers):
        for kind in ("key", "value"):
            row = (spec.num_kv_heads, spec.max_length, spec.head_dim)
            shapes(f"past_key_values.{layer}.{kind}", (1, *row), (batch, *row), (batch, *row))
    return profile
