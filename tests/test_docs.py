"""The commands and the Python of the README are run as they stand; links lead somewhere; the reference is complete; settings agree."""

import ast
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.cli import main
from tests.conftest import ROOT, SLOW, SLOW_FILES

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


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
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "path", [path for path in DOCS if path.name != "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_that_are_named_exist(path):
    """A path in backticks that begins with a folder of this repository is a file or a folder; capitals stand for a name of the reader's."""
    text = path.read_text(encoding="utf-8")
    for named in re.findall(r"`((?:ngpt|export|engines|triton_repo|scripts|tests|docs|deploy|examples)/[^`\s]*)`", text):
        if not re.search(r"[A-Z]{4,}|[*{]", named):
            assert (ROOT / named).exists(), f"{named} is not there"


def test_every_target_is_in_the_readme():
    from engines.target import target_names

    for name in target_names():
        assert f"`{name}`" in README


def test_the_helps_teach(capsys):
    for command in ("plan", "build", "verify", "package", "serve", "generate", "inspect", "convert", "bench", "store", "doctor"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and len(capsys.readouterr().out) > 150
    script = subprocess.run(
        [sys.executable, str(Path("scripts/build_engine.py")), "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert script.returncode == 0 and "onnx-portable" in script.stdout


def documented(docstring):
    """Argument -> the default that its line of a Google-style docstring states, or None, in order."""
    arguments = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(docstring), re.S)[1]
    found = {}
    for name, about in re.findall(r"^    (\w+) \((.*)\):$", arguments, re.M):
        default = re.search(r"defaults to `*(.+?)`*$", about)
        found[name] = ast.literal_eval(default[1]) if default else None
    return found


def test_every_argument_of_the_configuration_is_documented_with_its_default():
    from ngpt import NGPTConfig

    own = {name: getattr(NGPTConfig, name) for name in NGPTConfig.__annotations__ if name in NGPTConfig.__dict__}
    own = {
        name: default for name, default in own.items() if not name.startswith(("model_type", "keys_", "default_theta", "base_"))
    }
    assert list(documented(NGPTConfig.__doc__)) == list(own)
    for name, default in documented(NGPTConfig.__doc__).items():
        assert default == own[name], name


def test_every_option_of_a_request_is_documented():
    from engines.runtime.sampling import SamplingParams

    arguments = re.search(r"Args:\n(.*?)\n\n", inspect.cleandoc(SamplingParams.__doc__), re.S)[1]
    assert re.findall(r"^    (\w+): ", arguments, re.M) == list(SamplingParams.option_names())


@pytest.mark.parametrize("model", ["NGPTModel", "NGPTForCausalLM"])
def test_every_argument_of_forward_is_documented(model):
    import ngpt

    forward = inspect.unwrap(getattr(ngpt, model).forward)
    assert list(documented(forward.__doc__)) == [
        name for name in inspect.signature(forward).parameters if name not in ("self", "kwargs")
    ]
    assert "Returns:" in forward.__doc__ and "Raises:" in forward.__doc__


PUBLIC = {
    "ngpt": (),
    "engines": (),
    "engines.parity": (),
    "engines.target": ("load_target",),
    "engines.backends": ("register", "Backend"),
    "engines.runtime.engine": ("Engine", "register_runner"),
    "engines.runtime.sampling": ("SamplingParams",),
    "triton_repo": (),
    "triton_repo.client": ("generate_text", "generate_tokens", "stream_text", "RequestRefused"),
    "ngpt.errors": ("NGPTDeployError", "CheckpointError", "BuildError", "ServerError"),
    "engines.runtime.errors": ("ServingError", "RequestError", "EngineFileError"),
}
"""Modules whose public names the reference documents: those of `__all__`, or these."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built once; a warning is an error."""
    pytest.importorskip("furo", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = ["-q", "-W", "--keep-going", "-c", "docs", "-d", str(folder / "doctrees"), ".", str(folder / "html")]
    run = subprocess.run([sys.executable, "-m", "sphinx", *command], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "html"


def test_the_site_has_every_guide_and_every_public_name(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    names = {name for kind, items in inventory.items() if kind.startswith("py:") for name in items}
    for module, public in PUBLIC.items():
        for name in public or set(importlib.import_module(module).__all__) - {"__version__"}:
            assert f"{module}.{name}" in names, f"{module}.{name} is not in docs/reference"
    assert {str(path.relative_to(ROOT).with_suffix("")) for path in DOCS} <= set(inventory["std:doc"])
    first = (site / "index.html").read_text(encoding="utf-8")
    assert "docs/building.html" in first and "ngpt-deploy" in first


def test_links_to_files_of_code_work_in_the_site(site):
    page = (site / "README.html").read_text(encoding="utf-8")
    (link,) = re.findall(r'href="([^"]*_downloads/[^"]*network\.py)"', page)
    assert (site / link).read_bytes() == (ROOT / "export" / "network.py").read_bytes()


def test_the_hooks_run_what_make_check_runs():
    import yaml

    recipe = re.search(r"^check: env\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    checks = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe.splitlines()]
    configuration = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in configuration["repos"] for hook in repository["hooks"]]
    assert [hook["entry"] for hook in hooks] == checks and len(checks) == 3


def test_every_test_that_is_called_slow_exists():
    for file in (*SLOW_FILES, *SLOW):
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in SLOW.get(file, ()):
            assert f"def {name}(" in source, f"{name} is not in {file}: correct SLOW in tests/conftest.py"


def test_the_readme_lists_every_extra():
    import tomllib

    table = README.split("| extra |")[1].split("\n\n")[0]
    for extra in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]:
        assert f"`{extra}`" in table, extra


def test_the_version_is_stated_once_or_the_same():
    import yaml

    import ngpt

    chart = yaml.safe_load((ROOT / "deploy" / "chart" / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["version"] == chart["appVersion"] == ngpt.__version__
    for file in ("deploy/kserve.yaml", "docs/deployment.md"):
        tags = re.findall(r"ngpt-deploy:([0-9]\S*)", (ROOT / file).read_text(encoding="utf-8"))
        assert tags and set(tags) == {ngpt.__version__}, file
    assert (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")[1].startswith(ngpt.__version__)
