"""The graphics card, its driver, CUDA, and what compiles kernels. No CUDA package is imported here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from engines.device import Device, detect
from engines.target import Gpu, Target
from scripts.doctoring.findings import Finding, State, isolated, size

GROUP = "card"
_DRIVER = """
import ctypes, json
library = ctypes.CDLL("libcuda.so.1")
status, version, count = library.cuInit(0), ctypes.c_int(), ctypes.c_int()
library.cuDriverGetVersion(ctypes.byref(version))
if status == 0:
    library.cuDeviceGetCount(ctypes.byref(count))
print(json.dumps({"status": status, "version": version.value, "count": count.value}))
"""


def driver(*, needed: bool = False) -> Finding:
    """libcuda, loaded in a process of its own: the newest CUDA that it runs, and the cards that it shows."""
    remedy = "install NVIDIA's driver for this card; in a container: docker run --gpus all ..."
    answer = isolated(_DRIVER, limit=30.0)
    if answer.trouble:
        found = "no libcuda.so.1" if "libcuda.so.1" in answer.trouble else answer.trouble
        return Finding(GROUP, "driver", "missing", found, "NVIDIA's driver", remedy, needed)
    version, status, count = (answer.value[key] for key in ("version", "status", "count"))
    found = f"CUDA up to {version // 1000}.{version % 1000 // 10}, {count} card(s)"
    if status:
        return Finding(GROUP, "driver", "unfit", f"{found}; cuInit ended with {status}", "NVIDIA's driver", remedy, needed)
    number = _driver_version()
    return Finding(GROUP, "driver", "good", f"{number}: {found}" if number else found, "NVIDIA's driver", "", needed)


def _driver_version() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    first = asked.stdout.strip().partition("\n")[0]
    return first if re.fullmatch(r"[\d.]+", first) else ""


def card(target: Target | None, *, needed: bool = False) -> Finding:
    """The first card, held against the target's."""
    device, gpu = detect(), None if target is None else target.gpu
    wanted = "" if gpu is None else _wanted(gpu)
    remedy = "build on a machine with that card, or choose the target of this one: --target auto" if gpu is not None else ""
    if device is None:
        return Finding(GROUP, "GPU", "missing", "none that nvidia-smi shows", wanted, remedy, needed)
    found = f"{device.name}, compute capability {device.compute_capability}, {size(device.memory_bytes)}"
    fits = gpu is None or not gpu.compute_capability or gpu.compute_capability == device.compute_capability
    return Finding(GROUP, "GPU", "good" if fits else "unfit", found, wanted, "" if fits else remedy, needed)


def card_memory(needed: int, why: str, device: Device | None) -> Finding:
    """The card's memory against what one sequence of full length takes. Nothing to hold it against without a card."""
    wanted = f"{size(needed)}: {why}"
    if device is None or not device.memory_bytes:
        return Finding(GROUP, "GPU memory", "unknown", "no card to ask", wanted)
    state: State = "good" if device.memory_bytes >= needed else "unfit"
    remedy = "" if state == "good" else "choose a narrower --precision, or divide the model (--tp)"
    return Finding(GROUP, "GPU memory", state, size(device.memory_bytes), wanted, remedy)


def compiler(*, needed: bool) -> Finding:
    """NVRTC or nvcc, which compile this project's kernels."""
    answer = isolated("import json; from export.plugins.compile import compiler; print(json.dumps(compiler()))", limit=60.0)
    found = answer.trouble or answer.value
    state: State = "unknown" if answer.trouble else "missing" if found == "none" else "good"
    remedy = "" if state == "good" else "pip install 'nvidia-cuda-nvrtc>=13' 'cuda-bindings>=13'  (extra tensorrt)"
    return Finding(
        GROUP, "compiler of kernels", state, "neither NVRTC nor nvcc" if found == "none" else found, "", remedy, needed
    )


def program(name: str, why: str, remedy: str, *, needed: bool) -> Finding:
    """A program on PATH."""
    path = shutil.which(name)
    state: State = "missing" if path is None else "good"
    return Finding(GROUP, name, state, str(Path(path)) if path else "not on PATH", why, "" if path else remedy, needed)


def _wanted(gpu: Gpu) -> str:
    return f"compute capability {gpu.compute_capability}" if gpu.compute_capability else "any card that the library supports"
