"""Whether a TensorRT engine can run on a machine, told from its manifest before anything is loaded. Needs no GPU.

A plan is locked to what built it: TensorRT deserialises only plans of its own version (its version-compatible mode is not used
here), TensorRT-RTX likewise from release to release, and both only on a compute capability the plan was built for. Source:
"Engine Compatibility" in NVIDIA's documentation of TensorRT 11.1 and of TensorRT-RTX.
"""

from __future__ import annotations

from .errors import EngineFileError, ServingError
from .manifest import Manifest

# manifest.target.runtime, which is the Python module that built the plan and must load it -> the package that installs it
PACKAGES = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu13"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_REBUILD = "Build the engine again for this machine, or serve it on the one it was built for."
# TensorRT wants tensor addresses aligned like cudaMalloc's; every row of the cache is such an address.
_ALIGNMENT = 256


def problems(
    manifest: Manifest, *, tensorrt_version: str | None, compute_capability: str | None, memory_bytes: int | None
) -> list[ServingError]:
    """What keeps the engine from running there, each as an error that says what to do; [] for an engine of another runtime.

    tensorrt_version: `__version__` of the module named by target.runtime. compute_capability: like "12.0". memory_bytes: what the
    device can give. None for any of them: not known, not checked.
    """
    runtime = manifest.target.runtime
    if runtime not in PACKAGES:
        return []
    found: list[ServingError] = list(_malformed(manifest))
    if found:
        return found
    built = manifest.tools[runtime]
    if tensorrt_version not in (None, built):
        found.append(
            EngineFileError(
                f"the plan of {manifest.name} is locked to the version of {runtime} that built it",
                expected=built,
                found=str(tensorrt_version),
                remedy=f"Install {runtime} {built}, or build the engine again with this version.",
            )
        )
    wanted = manifest.flags.get("compute_capability")
    if wanted is not None and compute_capability not in (None, wanted):
        found.append(
            EngineFileError(
                f"the plan of {manifest.name} was built for another GPU",
                expected=f"compute capability {wanted}",
                found=str(compute_capability),
                remedy=_REBUILD,
            )
        )
    needed = memory_needed(manifest, 1)
    if memory_bytes is not None and memory_bytes < needed:
        found.append(
            EngineFileError(
                f"{manifest.name} does not fit the device's memory",
                expected=f"at least {needed} bytes (plan, and the cache of one sequence)",
                found=f"{memory_bytes} bytes",
                remedy="Free memory, use a larger device, or build with a smaller precision or maximum length.",
            )
        )
    return found


def check_slots(manifest: Manifest, num_slots: int) -> None:
    """Raises EngineFileError if the engine cannot decode `num_slots` sequences at once."""
    if manifest.target.runtime not in PACKAGES:
        return
    for problem in _malformed(manifest):
        raise problem
    limit = flag(manifest, "decode_batch")
    if num_slots > limit:
        raise EngineFileError(
            f"num_slots is above what {manifest.name} was built for",
            expected=f"at most {limit} (decode_batch)",
            found=str(num_slots),
            remedy=f"Ask for {limit} slots, or build the engine with a larger decode_batch.",
        )


def slots_for(manifest: Manifest, wanted: int) -> int:
    """`wanted` slots, or as many as the engine was built for where those are fewer."""
    return min(wanted, flag(manifest, "decode_batch")) if manifest.target.runtime in PACKAGES else wanted


def flag(manifest: Manifest, name: str) -> int:
    """A whole number of manifest.flags. Raises EngineFileError unless it is one of at least 1."""
    value = manifest.flags.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise EngineFileError(
            f"manifest field 'flags.{name}'",
            expected="an integer of at least 1",
            found=repr(value),
            remedy="Build the engine again; do not edit the manifest by hand.",
        )
    return value


def row_bytes(manifest: Manifest) -> int:
    """Bytes of one sequence's keys, or values, in one layer: [K, max_length, D] in the cache's dtype."""
    model = manifest.model
    return model.num_kv_heads * model.max_length * model.head_dim * ITEM_BYTES[model.cache_dtype]


def memory_needed(manifest: Manifest, num_slots: int) -> int:
    """Bytes of device memory of the plan and the cache alone: a lower bound, activations come on top."""
    copies = 1 if manifest.target.cache == "in-place" else 2
    return manifest.files[manifest.graph].bytes + 2 * manifest.model.num_layers * row_bytes(manifest) * num_slots * copies


def _malformed(manifest: Manifest) -> list[EngineFileError]:
    """The first thing about a TensorRT manifest that nothing can be made of."""
    runtime, remedy = manifest.target.runtime, "Build the engine again; do not edit the manifest by hand."
    capability = manifest.flags.get("compute_capability")
    wrong = ""
    if manifest.target.cache not in ("in-place", "past-present"):
        wrong, expected, found = "target.cache", "in-place or past-present", manifest.target.cache
    elif manifest.model.cache_dtype not in ITEM_BYTES:
        wrong, expected, found = "model.cache_dtype", " or ".join(ITEM_BYTES), manifest.model.cache_dtype
    elif runtime not in manifest.tools:
        wrong, expected, found = f"tools.{runtime}", "the version that built the plan", "nothing"
    elif capability is not None and not isinstance(capability, str):
        wrong, expected, found = "flags.compute_capability", 'a text like "12.0"', repr(capability)
    elif row_bytes(manifest) % _ALIGNMENT:
        wrong, expected, found = (
            "model.max_length",
            f"rows of the cache of a multiple of {_ALIGNMENT} bytes",
            f"{row_bytes(manifest)} bytes",
        )
        remedy = "Build the engine with a maximum length that is a multiple of 64."
    if wrong:
        return [EngineFileError(f"manifest field {wrong!r}", expected=expected, found=found, remedy=remedy)]
    try:
        flag(manifest, "decode_batch"), flag(manifest, "prefill_tokens")
    except EngineFileError as error:
        return [error]
    return []
