"""What the numbers were measured on."""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from scripts.gpu.report import Unavailable

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "tensorrt",
    "tensorrt_rtx_cu13",
    "ml_dtypes",
)


def describe() -> dict[str, Any]:
    """Card, driver, versions and date; keys whose value is unknown are absent."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "system": platform.platform(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.memory,power.limit", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        facts["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    try:
        torch = require_cuda()
    except Unavailable:
        return facts
    card = torch.cuda.get_device_properties(0)
    facts |= {
        "card": card.name,
        "compute_capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": card.L2_cache_size,
        "torch_cuda": torch.version.cuda,
    }
    return facts


def require_cuda() -> Any:
    """The torch module, on a machine where it sees a CUDA device. Raises Unavailable elsewhere."""
    try:
        import torch
    except ImportError as error:
        raise Unavailable("torch is not importable") from error
    if not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device")
    return torch


def architecture(capability: tuple[int, int], known: list[int]) -> int:
    """The newest architecture the plugins are compiled for that a card of this compute capability runs. Raises Unavailable."""
    fitting = [arch for arch in known if arch <= capability[0] * 10 + capability[1]]
    if not fitting:
        raise Unavailable(f"the kernels need compute capability {min(known) / 10}, this card has {capability[0]}.{capability[1]}")
    return max(fitting)
