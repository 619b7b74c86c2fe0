"""The commands and the Python of the README are run as they stand, and its links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.cli import main
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder in which the README's commands leave their outputs."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def commands():
    block = re.search(r"```console\n(.*?)```", README, re.S)
    return [line.removeprefix("$ ") for line in block[1].splitlines() if line.startswith("$ ")]


def test_readme_commands_and_python_run(checkout):
    lines = commands()
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)
        assert words[0] == ".venv/bin/ngpt-deploy"
        run = subprocess.run(
            [sys.executable, "-m", "scripts.cli", *words[1:]], cwd=checkout, env=environment(), capture_output=True
        )
        assert run.returncode == 0, (line, run.stderr.decode())
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert "load_engine" in code
    subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment(), check=True)


def environment():
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_every_target_is_in_the_readme():
    from engines.target import target_names

    for name in target_names():
        assert f"`{name}`" in README


def test_the_helps_teach(capsys):
    for command in ("plan", "build", "verify", "package", "serve", "generate", "inspect", "convert", "bench"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and len(capsys.readouterr().out) > 150
    script = subprocess.run(
        [sys.executable, str(Path("scripts/build_engine.py")), "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert script.returncode == 0 and "onnx-portable" in script.stdout
