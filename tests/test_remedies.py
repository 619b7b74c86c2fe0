"""What the errors advise works: packages that exist, by the names under which they are installed."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import ngpt
from ngpt.errors import missing_package
from scripts.cli import main
from scripts.terminal import _EXTRAS
from tests.conftest import ROOT


def declared():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_remedy_names_an_extra_that_exists_and_installs_all_of_it():
    extras, used = declared()["optional-dependencies"], set(_EXTRAS.values())
    for folder in ("ngpt", "export", "engines", "triton_repo", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "missing_package":
                    used |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    assert len(used) >= 4 and used <= set(extras)
    for extra in used:
        remedy = missing_package("x", extra).remedy
        assert remedy.startswith("pip install ")
        for requirement in extras[extra]:
            assert re.match(r"[a-z0-9-]+(\[grpc\])?", requirement)[0] in remedy


def test_an_installation_without_the_checkout_takes_remedies_from_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr("ngpt.errors.__file__", str(tmp_path / "ngpt" / "errors.py"))
    lines = ["numpy>=1.26", 'torch>=2.9; extra == "torch"', "onnx>=1.20; extra == 'onnx'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert missing_package("x", "torch").remedy == "pip install 'torch>=2.9'"
    monkeypatch.setattr("importlib.metadata.requires", lambda name: None)
    assert "pyproject.toml lists under 'torch'" in missing_package("x", "torch").remedy


def test_no_text_advises_to_install_this_project_from_an_index_that_lacks_it():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".sh", "") and path.is_file() and path != Path(__file__):
            assert "ngpt-deploy" + "[" not in path.read_text(encoding="utf-8", errors="replace"), name


def test_the_version_is_stated_once(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"ngpt-deploy {ngpt.__version__}\n"
    project = declared()
    assert "version" not in project and project["dynamic"] == ["version"]
