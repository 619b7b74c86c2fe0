"""TEST DOUBLE of a CUDA device for the kernels of export/plugins: their sources, compiled for the CPU (cuda_on_host.h).

All kernels of a suite go into one shared library, built by the C++ compiler of the ziglang wheel.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.plugins.compile import FOLDER

HERE = Path(__file__).parent


class Emulator:
    """`emulator.launch(kernel, count, *arguments)`: arrays and ints in the order of the kernel's parameters."""

    def __init__(self, kernels, folder, sources=FOLDER):
        pytest.importorskip("ziglang", reason="ziglang is not installed: make env")
        self.kernels = list(dict.fromkeys(kernels))
        units = []
        for i, kernel in enumerate(self.kernels):
            arguments = ", ".join(f"host::Argument{{arguments[{j}]}}" for j in range(len(kernel.parameters)))
            lines = [f"#define {name} {value}" for name, value in kernel.macros.items()]
            # A namespace of its own: the same inline functions compiled with other macros must not be merged by the linker.
            lines += ['#include "cuda_on_host.h"', f"#define {kernel.name} kernel_{i}", f"namespace unit_{i} {{"]
            lines += [f'#include "{kernel.name}.cu"', "}", "static void** arguments;"]
            lines += [f"static void call() {{ unit_{i}::kernel_{i}({arguments}); }}"]
            lines += [
                f'extern "C" const char* launch_{i}(int blocks, int x, int y, void** from) {{',
                "  arguments = from;\n  return host::launch(blocks, x, y, call);\n}",
            ]
            units.append(Path(folder) / f"unit_{i}.cpp")
            units[-1].write_text("\n".join(lines) + "\n")
        library = Path(folder) / "kernels.so"
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fno-exceptions", "-fno-rtti", "-nostdlib++", "-fno-sanitize=all"]
        command = [sys.executable, "-m", "ziglang", "c++", *flags, f"-I{HERE}", f"-I{sources}", *map(str, units)]
        run = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        self._library = ctypes.CDLL(str(library))

    def launch(self, kernel, count, *arguments):
        """Run over `count` rows or tokens; AssertionError where the emulated device finds a fault."""
        holders = []
        for value, kind in zip(arguments, kernel.parameters, strict=True):
            if kind == "u64":
                assert isinstance(value, np.ndarray) and value.flags.c_contiguous
                holders.append(ctypes.c_void_p(value.ctypes.data))
            else:
                holders.append(ctypes.c_int32(value))
        addresses = (ctypes.c_void_p * len(holders))(*(ctypes.addressof(holder) for holder in holders))
        function = getattr(self._library, f"launch_{self.kernels.index(kernel)}")
        function.restype = ctypes.c_char_p
        fault = function(kernel.grid(count), *kernel.block, addresses)
        assert fault is None, fault.decode()
