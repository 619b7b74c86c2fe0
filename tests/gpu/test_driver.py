"""The driver API as it is called, through cuda-bindings and through ctypes, against a driver library that records."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.gpu.driver import drivers
from tests.conftest import ROOT

DOUBLE = Path(__file__).parents[1] / "doubles" / "libcuda.c"
CHECK = """
import ctypes, sys
import torch
from export.plugins.compile import compile_ptx
from export.plugins.kernels import HypersphereUpdate
kernel = HypersphereUpdate(4096, 1e-6, "bfloat16")
ptx = compile_ptx(kernel, 80)
# Last: NVRTC does not survive a compilation after the double's symbols have become global.
library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
from scripts.gpu.driver import Launcher, drivers

class Launch(ctypes.Structure):
    _fields_ = [("function", ctypes.c_uint64), ("sizes", ctypes.c_uint64 * 7), ("stream", ctypes.c_uint64),
                ("inputs", ctypes.c_uint64 * 3), ("rows", ctypes.c_int64), ("output", ctypes.c_uint64)]

class Stream:
    cuda_stream = 0x7F0000001230

torch.cuda.current_stream = Stream
driver = drivers()[sys.argv[2]]
launcher = Launcher(driver, kernel, ptx)
h, x, out = (torch.zeros(21, 4096, dtype=torch.bfloat16) for _ in range(3))
lr = torch.zeros(4096)
launcher(21, h, x, lr, 21, out)
library.last_launch.restype, library.last_entry.restype = ctypes.POINTER(Launch), ctypes.c_char_p
last = library.last_launch()[0]
assert library.last_entry() == b"hypersphere_update"
assert last.function == 0x111 and last.stream == Stream.cuda_stream
assert list(last.sizes) == [21, 1, 1, 256, 1, 1, 0], list(last.sizes)
assert list(last.inputs) == [t.data_ptr() for t in (h, x, lr)]
assert last.rows == 21 and last.output == out.data_ptr()
try:
    launcher(21, h.T, x, lr, 21, out)
except ValueError as error:
    assert "contiguous" in str(error)
else:
    raise AssertionError("took a tensor that is not contiguous")
try:
    Launcher(driver, kernel, "not PTX")
except RuntimeError as error:
    assert "CUDA_ERROR_INVALID_PTX" in str(error), error
else:
    raise AssertionError("took something that is not PTX")
print("all", "right")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    pytest.importorskip("ziglang", reason="ziglang is not installed: make env")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-shared",
        "-fPIC",
        "-Wl,-soname,libcuda.so.1",
        str(DOUBLE),
        "-o",
        str(path),
    ]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("name", ["cuda-bindings", "ctypes"])
def test_a_launch(library, name):
    if name == "cuda-bindings":
        pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed: make env")
    command = [sys.executable, "-c", CHECK, str(library), name]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "all right\n", run.stderr


def test_no_driver_no_names():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    assert drivers() == {}
