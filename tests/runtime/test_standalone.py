"""The runtime is copied into model repositories: it must live there without this project and without PyTorch."""

from __future__ import annotations

import ast
import copy
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import engines.runtime
from engines.runtime import errors

FOLDER = Path(engines.runtime.__file__).parent
ALLOWED = {
    "numpy",
    "tokenizers",
    "onnxruntime",
    "llguidance",
}  # the last two lazily, too. TensorRT and cuda-bindings are imported by name, lazily


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_imports_are_relative_or_allowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        for name in names:
            root = name.split(".")[0]
            assert root in ALLOWED or root in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_a_copy_under_another_name_works_alone(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    program = """
import sys
import serving, serving.engine, serving.manifest, serving.onnx_runner, serving.tensorrt_runner
assert serving.SamplingParams(temperature=0).greedy
heavy = {"llguidance", "torch", "transformers", "onnx", "onnxruntime", "cuda", "tensorrt_rtx", "engines", "export", "ngpt", "triton_repo"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_these() -> None:
    """Others build on them: a change here is a change of the interface."""
    assert sorted(engines.runtime.__all__) == [
        "Cancelled", "CapacityError", "ClosedError", "Engine", "EngineFileError", "FileEntry", "Guide", "Manifest", "MissingRuntimeError",
        "ModelInfo", "RequestError", "RequestHandle", "Result", "Runner", "RunnerError", "SamplingParams", "Scheduler",
        "ServingError", "Stats", "TargetInfo", "TextStream", "Times", "TokenEvent", "Tokenizer", "load_engine", "read_manifest",
        "verify_files", "write_manifest",
    ]  # fmt: skip
    assert all(hasattr(engines.runtime, name) for name in engines.runtime.__all__)


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServingError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_read_well_and_travel(kind: type[errors.ServingError]) -> None:
    error = kind("the thing", expected="A", found="B", remedy="Do C.")
    assert str(error) == "the thing: expected A, found B. Do C."
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is kind and str(twin) == str(error) and twin.found == "B"
    assert str(kind("the thing")) == "the thing"
