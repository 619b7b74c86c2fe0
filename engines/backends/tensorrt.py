"""TensorRT and TensorRT-RTX: a network, its optimisation profiles, and the plan for one card.

tensorrt_rtx builds without a GPU, which the tests do; plans of `tensorrt` (form "plugins") are contract-tested, not built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.backends.protocol import Job, StoredRows, TapFunction, Written
from engines.memory import check_fits, total_bytes
from engines.runtime.manifest import Manifest
from engines.runtimes import RUNTIMES
from engines.target import Profile, Target
from export.lowerings.tensorrt.library import Library, load_library
from export.lowerings.tensorrt.native import TensorRT
from export.lowerings.tensorrt.weights_file import WeightsFile
from export.network import define_network
from export.precision import Precision
from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt.progress import Progress, silent
from ngpt.spec import NGPTSpec

PREFILL, DECODE = 0, 1
"""Indices of the two optimisation profiles."""
PLAN = "model.engine"
_SMALL_FILES = 16 << 20


class TensorRTBackend:
    """Engines of `tensorrt` or `tensorrt_rtx`, by the name of the module."""

    def __init__(self, name: str) -> None:
        self.runtime = RUNTIMES[name]

    def tools(self) -> Mapping[str, str]:
        library = self._library()
        return {library.name: library.version}

    def check(self, spec: NGPTSpec, target: Target, parallel: Parallel) -> None:
        check_fits(spec, target)

    def estimate(self, spec: NGPTSpec, target: Target, parallel: Parallel) -> int:
        # A plan is built from a scratch file of the same weights.
        return 2 * total_bytes(spec, target.precision) + _SMALL_FILES

    def write(self, job: Job, folder: Path, progress: Progress) -> Written:
        library, target = self._library(), fitted(job.spec, job.target)
        build_plan(job.weights, target, library, folder / PLAN, progress=progress)
        assert target.gpu is not None and target.profile is not None  # `Target` sees to it
        flags = {"form": target.form, "compute_capability": target.gpu.compute_capability or None}
        cache = None if library.has_cache_update else "past-present"
        return Written(PLAN, flags | dataclasses.asdict(target.profile), cache=cache)

    def taps(self, folder: Path, manifest: Manifest, precision: Precision, scratch: Path) -> TapFunction | None:
        return None  # a plan shows its logits alone

    def stored(self, folder: Path, manifest: Manifest) -> StoredRows | None:
        return None

    def outline(self, job: Job, folder: Path) -> list[str]:
        profile = fitted(job.spec, job.target).profile
        assert profile is not None and job.target.gpu is not None
        sizes = f"prompts in pieces of {profile.prefill_tokens} tokens, {profile.decode_batch} sequences decoded at once"
        return [f"build {folder / PLAN} for compute capability {job.target.gpu.compute_capability or 'any'}: {sizes}"]

    def _library(self) -> Library:
        return load_library(self.runtime.name)


def fitted(spec: NGPTSpec, target: Target) -> Target:
    """The target with its profile as large as the model's length and the card's memory allow."""
    assert target.profile is not None
    fits = check_fits(spec, target).sequences(spec.max_length)
    profile = Profile(min(target.profile.prefill_tokens, spec.max_length), min(fits, target.profile.decode_batch))
    return dataclasses.replace(target, profile=profile)


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
    with WeightsFile(path.parent) as scratch:
        architecture = int(target.gpu.compute_capability.replace(".", "") or 80)
        lowered = lowering(target)(weights, library, network, scratch, target.precision, progress, architecture)
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
    from export.lowerings.tensorrt.plugins import TensorRTPlugins

    return TensorRTPlugins


def _profile(builder: Any, spec: NGPTSpec, library: Library, sizes: Profile, index: int) -> Any:
    """PREFILL: one sequence, up to prefill_tokens tokens, any of their logits. DECODE: up to decode_batch sequences, one
    token."""
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
