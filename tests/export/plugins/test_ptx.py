"""The PTX that an engine embeds: its parameters, that every architecture's assembler takes it, and what it costs."""

import re
import subprocess
from pathlib import Path

import pytest

from export.plugins import compile as compiling
from export.plugins.compile import ARCHITECTURES, compile_ptx, parameters
from export.plugins.kernels import MOST_CHANNELS, MOST_THREADS, HypersphereUpdate, QKNorm
from ngpt.errors import BuildError, MissingPackageError, UnsupportedError
from tests.export.plugins.cases import NORMS, UPDATES, label

LARGEST = [HypersphereUpdate(MOST_CHANNELS * MOST_THREADS, 1e-6, dtype) for dtype in ("float32", "float16", "bfloat16")]
EIGHT_B = [HypersphereUpdate(4096, 1e-6, "bfloat16"), QKNorm(32, 8, 128, 128, "bfloat16")]


@pytest.fixture(scope="module")
def tools():
    """Folder of nvcc and ptxas, from the wheel nvidia-cuda-nvcc."""
    nvidia = pytest.importorskip("nvidia", reason="nvidia-cuda-nvcc is not installed: make env")
    folders = [folder for root in nvidia.__path__ for folder in Path(root).glob("cu*/bin") if (folder / "ptxas").exists()]
    if not folders:
        pytest.skip("nvidia-cuda-nvcc is not installed: make env")
    return folders[0]


def assemble(tools, ptx, architecture, folder):
    """What ptxas reports."""
    (folder / "kernel.ptx").write_text(ptx)
    command = [tools / "ptxas", f"-arch=sm_{architecture}", "-v", "-o", folder / "kernel.cubin", folder / "kernel.ptx"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_assembles_for_every_architecture_without_spills(tools, architecture, tmp_path):
    for kernel in [*UPDATES, *NORMS, *LARGEST, *EIGHT_B]:
        ptx = compile_ptx(kernel, architecture)
        assert f".target sm_{architecture}" in ptx and f".version {ARCHITECTURES[architecture]}\n" in ptx
        assert parameters(ptx, kernel.name) == kernel.parameters
        report = assemble(tools, ptx, architecture, tmp_path)
        assert "0 bytes spill stores, 0 bytes spill loads" in report, (kernel, report)


def test_the_oldest_ptx_assembles_for_the_newest_card(tools, tmp_path):
    for kernel in EIGHT_B:
        assemble(tools, compile_ptx(kernel, 80), 120, tmp_path)


def test_enough_rows_are_in_flight(tools, tmp_path):
    """At 4096 bfloat16 channels a multiprocessor holds 5 rows of 16 KiB: Little's law asks for about 25 KiB on an H200."""
    update, norm = (assemble(tools, compile_ptx(kernel, 90), 90, tmp_path) for kernel in EIGHT_B)
    for kernel, report, least in ((EIGHT_B[0], update, 5), (EIGHT_B[1], norm, 10)):
        registers = -(-int(re.search(r"Used (\d+) registers", report)[1]) // 8) * 8  # allocated by eights
        threads = kernel.block[0] * kernel.block[1]
        assert 65536 // (registers * threads) >= least, report


@pytest.mark.parametrize("kernel", EIGHT_B, ids=label)
def test_memory_is_accessed_sixteen_bytes_at_a_time(kernel):
    ptx = compile_ptx(kernel, 80)
    # The row's position in the tables is the one narrow load.
    narrow = [line for line in re.findall(r"ld\.global\S*", ptx) if ".v4" not in line]
    assert len(narrow) == (kernel.name == "qk_norm")
    stores = re.findall(r"st\.global\S*", ptx)
    assert stores and all(".v4" in store for store in stores)
    assert ".local" not in ptx


@pytest.mark.parametrize("kernel", EIGHT_B, ids=label)
def test_nvcc_stands_in_for_nvrtc(tools, kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_nvrtc", lambda: None)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    ptx = compile_ptx.__wrapped__(kernel, 90)
    assert "0 bytes spill stores" in assemble(tools, ptx, 90, tmp_path)


def test_no_compiler_at_all(monkeypatch):
    monkeypatch.setattr(compiling, "_nvrtc", lambda: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackageError, match="extra 'tensorrt'.*pip install"):
        compile_ptx.__wrapped__(EIGHT_B[0], 90)


def test_sources_that_do_not_compile_say_why(monkeypatch, tmp_path):
    (tmp_path / "qk_norm.cu").write_text("not C++")
    monkeypatch.setattr(compiling, "FOLDER", tmp_path)
    with pytest.raises(BuildError, match=r"(?s)NVRTC.*error: "):
        compile_ptx.__wrapped__(EIGHT_B[1], 80)


def test_parameters_in_another_order_are_refused(monkeypatch, tmp_path):
    for source in compiling.FOLDER.glob("*.cu*"):
        text = source.read_text()
        if source.name == "hypersphere_update.cu":
            swapped = text.replace("int rows,\n", "Element* __restrict__ out,\n").replace(
                "Element* __restrict__ out)", "int rows)"
            )
            assert swapped != text
            text = swapped
        (tmp_path / source.name).write_text(text)
    monkeypatch.setattr(compiling, "FOLDER", tmp_path)
    with pytest.raises(BuildError, match="expected u64, u64, u64, u32, u64, found u64, u64, u64, u64, u32"):
        compile_ptx.__wrapped__(EIGHT_B[0], 80)


def test_unknown_entry_and_architecture():
    with pytest.raises(BuildError, match="entry named other"):
        parameters(compile_ptx(EIGHT_B[0], 80), "other")
    with pytest.raises(UnsupportedError, match="expected 80, 86, 89, 90, 100, 120, found 75"):
        compile_ptx(EIGHT_B[0], 75)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HypersphereUpdate(20, 0.0, "float32"), "hidden size .* found 20"),
        (lambda: HypersphereUpdate(0, 0.0, "float32"), "hidden size .* found 0"),
        (lambda: HypersphereUpdate(1 << 20, 0.0, "float32"), "up to 20480"),
        (lambda: HypersphereUpdate(64, -1.0, "float32"), "eps"),
        (lambda: HypersphereUpdate(64, float("nan"), "float32"), "eps"),
        (lambda: HypersphereUpdate(64, float("inf"), "float32"), "eps"),
        (lambda: HypersphereUpdate(64, 0.0, "int8"), "storage type"),
        (lambda: QKNorm(4, 2, 264, 64, "float32"), "head_dim"),
        (lambda: QKNorm(4, 2, 60, 60, "float32"), "head_dim"),
        (lambda: QKNorm(4, 2, 64, 66, "float32"), "rotary_dim"),
        (lambda: QKNorm(4, 2, 64, 7, "float32"), "rotary_dim"),
        (lambda: QKNorm(4, 0, 64, 64, "float32"), "heads"),
    ],
)
def test_sizes_the_kernels_do_not_take(make, words):
    with pytest.raises(UnsupportedError, match=words):
        make()
