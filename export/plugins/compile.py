"""CUDA C++ to PTX, on a machine that needs neither a GPU nor a driver: NVRTC, or nvcc where cuda-bindings is absent.

Every result is checked against the parameter list the kernel is launched with. PTX carries the version of the instruction
set it was written in, and a driver refuses one newer than itself whatever the instructions are; these kernels use old
instructions alone, so the PTX declares the first version that knows its architecture (tests assemble it as such).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from export.plugins.kernels import Kernel
from ngpt.errors import BuildError, UnsupportedError, missing_package

FOLDER = Path(__file__).parent
# Compute capability -> first PTX version with that target (PTX ISA, release notes).
ARCHITECTURES = {80: "7.0", 86: "7.1", 89: "7.8", 90: "7.8", 100: "8.6", 120: "8.7"}


@lru_cache(maxsize=64)
def compile_ptx(kernel: Kernel, architecture: int = 80) -> str:
    """PTX of `kernel` for compute capability `architecture` (tens and units: 90 is 9.0) and every later one.

    Raises UnsupportedError for an unknown architecture, MissingPackageError where there is no compiler, and BuildError when
    the compiler refuses the source or the parameters are not those of `kernel.parameters`.
    """
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            "compute capability of the plugins", expected=", ".join(map(str, ARCHITECTURES)), found=str(architecture)
        )
    options = [f"-arch=compute_{architecture}", "-std=c++17", *(f"-D{name}={value}" for name, value in kernel.macros.items())]
    nvrtc = _nvrtc()
    ptx = _with_nvcc(kernel, options) if nvrtc is None else _with_nvrtc(nvrtc, kernel, options)
    ptx = re.sub(r"^\.version .*$", f".version {ARCHITECTURES[architecture]}", ptx, count=1, flags=re.MULTILINE)
    found = parameters(ptx, kernel.name)
    if found != kernel.parameters:
        raise BuildError(
            f"parameters of the compiled {kernel.name}",
            expected=", ".join(kernel.parameters),
            found=", ".join(found),
            remedy="the source and its description in export/plugins/kernels.py have parted",
        )
    return ptx


def parameters(ptx: str, name: str) -> tuple[str, ...]:
    """Types of the parameters of entry `name`, in order, for example ("u64", "u32"). Raises BuildError where it is absent."""
    entry = re.search(rf"\.visible \.entry {re.escape(name)}\((.*?)\)", ptx, re.DOTALL)
    if entry is None:
        raise BuildError("PTX of a plugin", expected=f"an entry named {name}")
    return tuple(re.findall(r"\.param\s+\.(\w+)", entry[1]))


def compiler() -> str:
    """Which compiler makes the PTX here, and its version; "none" where there is none."""
    nvrtc = _nvrtc()
    if nvrtc is not None:
        _, major, minor = nvrtc.nvrtcVersion()
        return f"NVRTC {major}.{minor}"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "none"
    try:
        asked = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return f"{nvcc}, which does not answer"
    return asked.stdout.strip().rpartition("\n")[2]


def _nvrtc() -> Any:
    """cuda-bindings' NVRTC, or None where it or the library under it is not installed."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):  # RuntimeError: the bindings are there, libnvrtc is not
        return None
    return nvrtc


def _with_nvrtc(nvrtc: Any, kernel: Kernel, options: Sequence[str]) -> str:
    def call(function: str, *arguments: Any) -> Any:
        status, *result = getattr(nvrtc, function)(*arguments)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(f"{function} of {kernel.name}.cu", found=status.name)
        return result[0] if result else None

    source = (FOLDER / f"{kernel.name}.cu").read_bytes()
    program = call("nvrtcCreateProgram", source, f"{kernel.name}.cu".encode(), 0, [], [])
    try:
        flags = [option.encode() for option in (*options, f"-I{FOLDER}")]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = bytearray(call("nvrtcGetProgramLogSize", program))
        call("nvrtcGetProgramLog", program, log)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BuildError(f"compiling {kernel.name}.cu with NVRTC", found=log.decode().rstrip("\0"))
        text = bytearray(call("nvrtcGetPTXSize", program))
        call("nvrtcGetPTX", program, text)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return text.decode().rstrip("\0")


def _with_nvcc(kernel: Kernel, options: Sequence[str]) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise missing_package("compiling the TensorRT plugins needs NVRTC or nvcc", "tensorrt")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernel.ptx"
        command = [nvcc, "-ptx", *options, "-o", str(output), str(FOLDER / f"{kernel.name}.cu")]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise BuildError(f"compiling {kernel.name}.cu with nvcc", found=run.stderr.strip())
        return output.read_text()
