"""The Helm chart rendered by Helm's own library, and every object held against the schemas of Kubernetes. Nothing is deployed."""

import functools

import helm_python
import kubernetes_validate
import pytest
import yaml

from tests.conftest import ROOT

CHART = ROOT / "deploy" / "chart"
KUBERNETES = "1.33"
VALUES = {
    "plain": {},
    "one-gpu-less": {"gpus": 0, "replicas": 1},
    "scaled": {"autoscaling": {"enabled": True}},
    "placed": {
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    },
    "two-nodes": {"gpus": 8, "multiNode": {"enabled": True}},
    "two-nodes-scaled": {"gpus": 8, "multiNode": {"enabled": True}, "autoscaling": {"enabled": True}},
    "patient": {"model": "tiny-1.b,other_tensorrt_llm", "shutdown": {"exitTimeoutSeconds": 600, "drainSeconds": 0}},
    "watched": {"monitoring": {"scrape": "PodMonitor", "rules": True, "dashboard": True}},
    "two-nodes-patient": {"gpus": 8, "multiNode": {"enabled": True}, "shutdown": {"exitTimeoutSeconds": 600, "drainSeconds": 30}},
}


@functools.cache
def rendered(case):
    """Objects by kind."""
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render(VALUES[case], name="demo", namespace="prod")
    objects = [found for text in files.values() for found in yaml.safe_load_all(text) if found]
    assert len({found["kind"] for found in objects}) == len(objects)
    return {found["kind"]: found for found in objects}


def pods(objects):
    """The pod templates of a rendering, by role."""
    if "Deployment" in objects:
        templates = [objects["Deployment"]["spec"]["template"]]
    else:
        group = objects["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
        templates = [group["leaderTemplate"], group["workerTemplate"]]
    return {template["metadata"]["labels"]["ngpt-deploy/role"]: template for template in templates}


def check_pod(template):
    """A template is valid where a pod of it is."""
    metadata = {"name": "x", **template["metadata"]}
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}, KUBERNETES, strict=True
    )


def test_helm_has_nothing_to_say_but_that_there_is_no_icon():
    found = helm_python.lint(str(CHART))
    assert not found["errors"] and [message["error"] for message in found["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("case", VALUES)
def test_every_object_fits_its_schema(case):
    objects = rendered(case)
    for kind, found in objects.items():
        if kind not in ("LeaderWorkerSet", "PodMonitor", "PrometheusRule"):  # not Kubernetes' own
            kubernetes_validate.validate(found, KUBERNETES, strict=True)
    for template in pods(objects).values():
        check_pod(template)


def test_the_validation_refuses_what_is_wrong():
    wrong = {**rendered("plain")["Service"], "spec": {"porst": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)
    template = pods(rendered("two-nodes"))["leader"]
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod({**template, "spec": {**template["spec"], "contaners": []}})


@pytest.mark.parametrize("case", VALUES)
def test_selectors_find_the_pods_that_serve(case):
    objects = rendered(case)
    labels = {role: set(template["metadata"]["labels"].items()) for role, template in pods(objects).items()}
    wanted = set(objects["Service"]["spec"]["selector"].items())
    assert [role for role, found in labels.items() if wanted <= found] == [role for role in labels if role != "worker"]
    budget = set(objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items())
    assert all(budget <= found for found in labels.values())
    if "Deployment" in objects:
        assert set(objects["Deployment"]["spec"]["selector"]["matchLabels"].items()) <= labels["server"]
    named = {port["name"] for role in labels if role != "worker" for port in container(objects, role)["ports"]}
    assert {port["targetPort"] for port in objects["Service"]["spec"]["ports"]} <= named


def container(objects, role):
    (found,) = pods(objects)[role]["spec"]["containers"]
    return found


@pytest.mark.parametrize("case", VALUES)
def test_every_pod_is_confined(case):
    for template in pods(rendered(case)).values():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["automountServiceAccountToken"] is False
        inside = spec["containers"][0]["securityContext"]
        assert not inside["allowPrivilegeEscalation"] and inside["readOnlyRootFilesystem"]
        assert inside["capabilities"] == {"drop": ["ALL"]}
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == volumes


def test_probes_run_an_inference_and_wait_longer_than_it():
    server = container(rendered("plain"), "server")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = server[probe]["exec"]["command"]
        assert command[:2] == ["python3", "/opt/ngpt/probe.py"] and command[command.index("--model") + 1] == "ensemble"
        # The inferences, and 5 s for the metrics.
        assert server[probe]["timeoutSeconds"] > float(command[command.index("--timeout") + 1]) + 10
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 20 * 60
    # One failure takes a pod out of the service. Three end it, without the time that requests in flight get otherwise.
    assert server["readinessProbe"]["failureThreshold"] == 1 and server["livenessProbe"]["failureThreshold"] == 3
    assert server["livenessProbe"]["terminationGracePeriodSeconds"] < 10
    probed = container(rendered("patient"), "server")["livenessProbe"]["exec"]["command"]
    assert probed[probed.index("--model") + 1] == "tiny-1.b,other_tensorrt_llm"


def grace(pod):
    """What a pod's grace period holds: seconds before the server is told, seconds that it may take, and seconds in all."""
    found = pod["containers"][0]
    drain = int(found["lifecycle"]["preStop"]["exec"]["command"][1]) if "lifecycle" in found else 0
    (limit,) = [word.split("=")[1] for word in found["args"] if word.startswith("--exit-timeout-secs=")] or [
        entry["value"] for entry in found["env"] if entry["name"] == "EXIT_TIMEOUT"
    ]
    return drain, int(limit), pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("case", "role", "expected"),
    [
        ("plain", "server", (5, 60, 80)),
        ("patient", "server", (0, 600, 615)),
        ("two-nodes", "leader", (5, 60, 80)),
        ("two-nodes-patient", "leader", (30, 600, 645)),
        ("two-nodes-patient", "worker", (0, 600, 645)),
    ],
)
def test_a_pod_is_killed_only_after_its_server_has_had_its_time(case, role, expected):
    drain, limit, seconds = found = grace(pods(rendered(case))[role]["spec"])
    assert found == expected and seconds >= drain + limit + 15


def test_gpus_are_asked_for_only_where_there_are_any():
    assert container(rendered("plain"), "server")["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": "1"}
    assert container(rendered("one-gpu-less"), "server")["resources"]["limits"] == {"memory": "16Gi"}
    for role in ("leader", "worker"):
        assert container(rendered("two-nodes"), role)["resources"]["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize(("case", "kind"), [("scaled", "Deployment"), ("two-nodes-scaled", "LeaderWorkerSet")])
def test_the_autoscaler_owns_the_number_of_replicas(case, kind):
    objects = rendered(case)
    target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {key: objects[kind][key] for key in ("apiVersion", "kind")} | {"name": objects[kind]["metadata"]["name"]}
    assert "replicas" not in objects[kind]["spec"]
    assert rendered(case.removesuffix("-scaled") if "-" in case else "plain")[kind]["spec"]["replicas"] == 2
    (metric,) = objects["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "ngpt_requests_queued"


def test_the_autoscalers_metric_is_one_that_the_server_has():
    assert '"ngpt_requests_queued"' in (ROOT / "triton_repo" / "templates" / "engine" / "model.py").read_text()
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert [rule["name"]["as"] for rule in rules] == ["ngpt_requests_queued", "trtllm_requests_queued"]
    assert all(rule["resources"]["overrides"]["pod"] == {"resource": "pod"} for rule in rules)


def test_a_group_is_one_job_over_its_nodes():
    """Field names as in the CRD leaderworkerset.x-k8s.io/v1."""
    objects = rendered("two-nodes")
    spec = objects["LeaderWorkerSet"]["spec"]
    assert objects["LeaderWorkerSet"]["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(spec) == {"replicas", "startupPolicy", "leaderWorkerTemplate"}
    # The controller makes a headless service of the set's name.
    assert objects["LeaderWorkerSet"]["metadata"]["name"] != objects["Service"]["metadata"]["name"]
    group = spec["leaderWorkerTemplate"]
    assert set(group) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert group["size"] == 2 and group["restartPolicy"] == "RecreateGroupOnPodRestart"
    for role in ("leader", "worker"):
        found = container(objects, role)
        assert found["args"] == ["/opt/ngpt/multinode.sh", role]
        given = {entry["name"]: entry["value"] for entry in found["env"]}
        assert given == {"GPUS_PER_NODE": "8", "MODELS": "/models", "SSH_PORT": "2222", "EXIT_TIMEOUT": "60"}
    assert objects["PodDisruptionBudget"]["spec"]["minAvailable"] == 2  # the pods of one group


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gpus": "one"}, "gpus"),
        ({"replica": 3}, "replica"),
        ({"models": {"path": "models"}}, "path"),
        ({"model": "no name"}, "model"),
        ({"shutdown": {"marginSeconds": 0}}, "marginSeconds"),
        ({"monitoring": {"scrape": "Probe"}}, "scrape"),
        ({"multiNode": {"enabled": True}, "gpus": 0}, "multiNode needs gpus of at least 1"),
    ],
)
def test_wrong_values_are_refused_by_name(values, words):
    with helm_python.Chart.load(str(CHART)) as chart, pytest.raises(helm_python.HelmError, match=words):
        chart.render(values, name="demo")
