"""What needs a CUDA device: the kernels' PTX through every driver interface that is installed, and golden logits."""

import pytest
import torch

from export.plugins.compile import ARCHITECTURES
from scripts.gpu import golden, kernels
from scripts.gpu.driver import drivers
from scripts.gpu.machine import architecture
from scripts.gpu.norms import NAMES, KernelNorms
from tests.conftest import GOLDEN, HF_CASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(scope="module")
def context():
    return torch.zeros(1, device="cuda")  # makes the context that driver calls use


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", ["cuda-bindings", "ctypes"])
def test_kernels(context, name, dtype):
    found = drivers()
    if name not in found:
        pytest.skip(f"{name} cannot be loaded")
    arch = architecture(torch.cuda.get_device_capability(), list(ARCHITECTURES))
    for target in {80, arch}:
        norms = KernelNorms(kernels.launcher_for(found[name], target))
        for row in kernels.accuracy(norms, dtype, "cuda", name):
            assert row.verdict == "ok", row


@pytest.mark.parametrize("case", HF_CASES)
@pytest.mark.parametrize("dtype", NAMES)
def test_golden_logits(case, dtype):
    row = golden.compare(GOLDEN / case, dtype, "cuda")
    assert row.verdict != "FAILED", row
