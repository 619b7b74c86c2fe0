"""The runtimes that engines are built for, as far as a target's file must know them: names, forms, precisions, what a target
has to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from export import precision
from export.precision import Precision
from ngpt.errors import TargetError, shown


@dataclass(frozen=True)
class Runtime:
    """A runtime by the name that targets and manifests use.

    precisions: by name. forms: of the network (`Target.form`). caches: how keys and values are kept (`Target.cache`).
    on_gpu: a target states a card and a profile, and no providers; else the other way round. divides: a model may be shared
    by several GPUs. float8_cache: keys and values can be cached as float8_e4m3.
    """

    name: str
    precisions: Mapping[str, Precision]
    forms: tuple[str, ...] = ("native",)
    caches: tuple[str, ...] = ("in-place",)
    on_gpu: bool = False
    divides: bool = False
    float8_cache: bool = False


RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("onnxruntime", precision.ONNX_RUNTIME, ("ort", "portable"), ("in-place", "growing")),
        Runtime("tensorrt", precision.TENSORRT, ("native", "plugins"), on_gpu=True),
        Runtime("tensorrt_rtx", precision.TENSORRT, on_gpu=True),
        Runtime(
            "tensorrt_llm",
            precision.TENSORRT_LLM,
            ("native", "plugins"),
            ("paged",),
            on_gpu=True,
            divides=True,
            float8_cache=True,
        ),
    )
}
"""By name; `engines.backends.register` adds those from outside."""


def runtime_of(name: object) -> Runtime:
    """The runtime by name. Raises TargetError listing those there are."""
    if not isinstance(name, str) or name not in RUNTIMES:
        raise TargetError("runtime", expected="one of " + ", ".join(RUNTIMES), found=shown(name, 200))
    return RUNTIMES[name]


def precision_of(runtime: str, name: object) -> Precision:
    """A runtime's precision by name. Raises TargetError listing those there are."""
    known = runtime_of(runtime).precisions
    if not isinstance(name, str) or name not in known:
        raise TargetError(f"precision of {runtime}", expected="one of " + ", ".join(known), found=shown(name, 200))
    return known[name]
