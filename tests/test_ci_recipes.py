"""examples/ci: the workflows by their schemas, and their steps run: green for a right engine, red for a wrong one.

Not run here: the services themselves, their actions (`uses:`), and pip, for which a double stands that writes down what it is asked.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from xml.etree import ElementTree

import jsonschema
import pytest
import yaml

from tests.conftest import GOLDEN, ROOT
from tests.parity.broken import break_engine

CI = ROOT / "examples" / "ci"
RECIPES = ("github.yml", "gitlab-ci.yml")
SCHEMAS = {"github.yml": "github-workflows.json", "gitlab-ci.yml": "gitlab-ci.json"}


def loaded(name):
    # YAML 1.1 takes the key `on` for true; GitHub does not.
    class Loader(yaml.SafeLoader):
        pass

    Loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool" or letter not in "oO"]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load((CI / name).read_text(encoding="utf-8"), Loader)  # noqa: S506


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_services_schema_says(name):
    schema = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / SCHEMAS[name]).read_text(encoding="utf-8"))
    kind = jsonschema.validators.validator_for(schema)
    kind(schema).validate(loaded(name))
    broken = loaded(name)
    if name == "github.yml":
        broken["jobs"]["parity"]["stepz"] = []
    else:
        broken["parity"]["artifacts"]["when"] = "sometimes"
    with pytest.raises(jsonschema.ValidationError):
        kind(schema).validate(broken)


def steps(name):
    """(name, shell text, whether it runs after a failure) of each step, and the variables."""
    data = loaded(name)
    if name == "github.yml":
        job = data["jobs"]["parity"]
        assert job["defaults"]["run"]["shell"] == "bash", "GitHub adds pipefail only then"
        found = [(step["name"], step["run"], step.get("if") == "always()") for step in job["steps"] if "run" in step]
        return found, data["env"]
    job = data["parity"]
    # GitLab joins the lines of a job into one script.
    return [("script", "\n".join([*job["before_script"], *job["script"]]), False)], data["variables"]


def run(name, folder, environment, between=lambda step: None):
    """Run the steps as the service does; returns (the job's exit code, all output)."""
    shims = folder / "shims"
    shims.mkdir()
    # Doubles of pip and of the installed command: one writes down its arguments, the other runs this checkout.
    (shims / "python").write_text(
        f'#!/bin/sh\nif [ "$1 $2" = "-m pip" ]; then echo "$@" >> "{folder}/pip.txt"; else exec "{sys.executable}" "$@"; fi\n'
    )
    (shims / "ngpt-deploy").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m scripts.cli "$@"\n')
    for shim in shims.iterdir():
        shim.chmod(0o755)
    listed, variables = steps(name)
    inherited = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{shims}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
    }
    variables = {key: str(value) for key, value in {**variables, **environment}.items()}
    code, output = 0, ""
    for step, text, always in listed:
        if code == 0 or always:
            words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", between(step) or text]
            done = subprocess.run(words, cwd=folder, env=inherited | variables, capture_output=True, text=True, timeout=300)
            output += done.stdout + done.stderr
            code = code or done.returncode
    return code, output


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An engine that is right, and one with a fault in its graph that its manifest does not betray."""
    from engines.build import build_engine

    folder = tmp_path_factory.mktemp("built")
    right = build_engine(GOLDEN / "gqa", "cpu-int8", folder / "right", verify=False)
    wrong = break_engine(right, folder / "wrong", "layers.1.attn.qk_scale", 1.5)
    return right, wrong


@pytest.fixture
def project(tmp_path):
    """A user's repository with a checkpoint in it."""
    shutil.copytree(GOLDEN / "gqa", tmp_path / "model", ignore=shutil.ignore_patterns("golden.npz"))
    return tmp_path


def artefacts(name):
    data = loaded(name)
    if name == "github.yml":
        (upload,) = [step for step in data["jobs"]["parity"]["steps"] if "upload-artifact" in step.get("uses", "")]
        (shown,) = [step for step in data["jobs"]["parity"]["steps"] if "junit" in step.get("uses", "")]
        assert upload["if"] == shown["if"] == "always()"
        return upload["with"]["path"].split(), shown["with"]["report_paths"]
    kept = data["parity"]["artifacts"]
    assert kept["when"] == "always"
    return kept["paths"], kept["reports"]["junit"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_right_engine_is_green_and_everything_is_there(name, project):
    code, output = run(name, project, {})
    assert code == 0, output
    paths, junit = artefacts(name)
    assert paths == ["engine/", "report/"] and all((project / path).is_dir() for path in paths)
    assert {"parity.json", "parity.html", "junit.xml"} <= {path.name for path in (project / "report").iterdir()}
    root = ElementTree.parse(project / junit).getroot()
    assert root.get("failures") == "0" and int(root.get("tests")) > 20
    assert json.loads((project / "engine" / "manifest.json").read_text())["parity"]["verdict"] == "pass"
    installed = (project / "pip.txt").read_text().splitlines()
    assert "whl/cpu" in installed[0] and installed[1].startswith("-m pip install ngpt-deploy[torch,onnx] @ git+https://")
    if name == "github.yml":
        assert "parity   pass" in (project / "summary.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_engine_is_red_and_its_report_is_kept(name, project, built):
    """A build that goes wrong: the engine that it leaves is replaced by a faulty one before `verify` sees it."""
    shutil.copytree(built[1], project / "wrong")

    def between(step):
        text = dict((step, text) for step, text, _ in steps(name)[0])[step]
        swap = "rm -rf engine && cp -r wrong engine"
        if step == "Build":
            return swap
        return re.sub(r"^ngpt-deploy build .*$", swap, text, flags=re.M) if step == "script" else text

    code, output = run(name, project, {}, between)
    assert code == 3, output
    root = ElementTree.parse(project / artefacts(name)[1]).getroot()
    assert int(root.get("failures")) > 5
    assert json.loads((project / "report" / "parity.json").read_text())["verdict"] == "fail"
    assert "What to do next" in (project / "report" / "parity.html").read_text()
    if name == "github.yml":
        assert "does not agree with PyTorch" in (project / "summary.md").read_text()


def test_a_baseline_and_a_text_are_taken_where_they_are_named(project, built):
    """Options that are empty are no arguments; options that are set are, blanks in their names included."""
    shutil.copytree(built[0], project / "right")
    code, output = run(
        "github.yml",
        project,
        {"BASELINE": "no such file.json"},
        lambda step: "rm -rf engine && cp -r right engine" if step == "Build" else None,
    )
    assert code == 2 and "no such file.json" in output, output
