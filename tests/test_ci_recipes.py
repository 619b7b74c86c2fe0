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

from engines.build import build_engine
from engines.parity import verify
from engines.parity.baseline import entry_of, figures_of, write_baseline
from engines.runtime.manifest import read_manifest
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
    """An engine that is right, one with a fault in its graph that its manifest does not betray; the manifest and the figures of
    the first."""
    folder = tmp_path_factory.mktemp("built")
    right = build_engine(GOLDEN / "gqa", "cpu-int8", folder / "right", verify=False)
    wrong = break_engine(right, folder / "wrong", "layers.1.attn.qk_scale", 1.5)
    report, manifest = verify(right, GOLDEN / "gqa"), read_manifest(right)
    return right, wrong, manifest, entry_of(manifest, report, [figures_of(report, manifest)])


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


def swapped(name, engine):
    """In the place of the build: an engine that is there already."""
    swap = f"rm -rf engine && cp -r {engine} engine"

    def between(step):
        text = dict((step, text) for step, text, _ in steps(name)[0])[step]
        return swap if step == "Build" else re.sub(r"^ngpt-deploy build .*$", swap, text, flags=re.M)

    return between


def test_a_checkpoint_goes_in_and_a_verified_engine_comes_out(project):
    code, output = run("github.yml", project, {})
    assert code == 0, output
    assert {"parity.json", "parity.html", "junit.xml"} <= {path.name for path in (project / "report").iterdir()}
    root = ElementTree.parse(project / artefacts("github.yml")[1]).getroot()
    assert root.get("failures") == "0" and int(root.get("tests")) > 20 and root.find("testsuite[@name='baseline']") is None
    assert json.loads((project / "engine" / "manifest.json").read_text())["parity"]["verdict"] == "pass"
    assert "parity   pass" in (project / "summary.md").read_text()


def test_a_right_engine_is_green_and_held_against_the_baseline_that_is_named(project, built):
    write_baseline(project / "its baseline.json", *built[2:])
    code, output = run("gitlab-ci.yml", project, {"BASELINE": "its baseline.json"}, swapped("gitlab-ci.yml", built[0]))
    assert code == 0 and "since its baseline.json was recorded" in output, output
    root = ElementTree.parse(project / artefacts("gitlab-ci.yml")[1]).getroot()
    assert root.get("failures") == "0" and root.find("testsuite[@name='baseline']") is not None


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_engine_is_red_and_its_report_is_kept(name, project, built):
    """The build's engine is replaced by a faulty one before `verify` sees it."""
    code, output = run(name, project, {}, swapped(name, built[1]))
    assert code == 3, output
    root = ElementTree.parse(project / artefacts(name)[1]).getroot()
    assert int(root.get("failures")) > 5
    assert json.loads((project / "report" / "parity.json").read_text())["verdict"] == "fail"
    assert "What to do next" in (project / "report" / "parity.html").read_text()
    if name == "github.yml":
        assert "does not agree with PyTorch" in (project / "summary.md").read_text()


@pytest.mark.parametrize("name", RECIPES)
def test_everything_that_is_made_is_kept_whatever_happens(name):
    assert artefacts(name) == (["engine/", "report/"], "report/junit.xml")
    text = "\n".join(text for _, text, _ in steps(name)[0])
    assert "--output engine " in text and "--report report " in text and "--junit report/junit.xml" in text
    assert "install torch --index-url https://download.pytorch.org/whl/cpu" in text and 'pip install "$NGPT_DEPLOY"' in text
