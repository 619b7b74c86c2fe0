"""What the server publishes is what the guide lists and what dashboard, alerts and autoscaler ask for."""

import re
import urllib.request

import pytest

from scripts import generated, metrics_table
from tests.deploy.expressions import everywhere, rules, selectors

OUR_LABELS = {"model", "version", "model_instance"}
# Of a GPU, of Prometheus itself, of TensorRT-LLM's backend: not there in these tests.
ELSEWHERE = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes", "nv_gpu_power_usage"} | {
    "up",
    "nv_trt_llm_request_metrics",
}


@pytest.fixture(scope="module")
def published(served):
    """The metrics as text."""
    with urllib.request.urlopen(f"http://{served.server.metrics_url}/metrics", timeout=10) as response:
        return response.read().decode()


def kinds(text):
    """The type of every series by its name."""
    found = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.M))
    histograms = [name for name, kind in found.items() if kind == "histogram"]
    return found | {f"{name}_{part}": "counter" for name in histograms for part in ("bucket", "sum", "count")}


def test_the_guide_names_every_metric_with_its_type_and_labels(published):
    guide = metrics_table.DOCUMENT.read_text(encoding="utf-8")
    found = guide.split(metrics_table.BEGIN)[1].split(generated.END)[0]
    assert found == metrics_table.table(), "run: python scripts/metrics_table.py --write"
    ours, frontend = found.split(metrics_table.FRONTEND)
    listed = {name: (kind, labels) for name, kind, labels in re.findall(r"^\| `(ngpt_\w+)` \| (\w+) \| ([^|]*) \|", ours, re.M)}
    assert {name: kind for name, (kind, _) in listed.items()} == dict(re.findall(r"^# TYPE (ngpt_\w+) (\w+)$", published, re.M))
    assert len(listed) == 11
    for name, (_, labels) in listed.items():
        (seen,) = {
            tuple(sorted(re.findall(r'(\w+)="', line))) for line in re.findall(rf"^{name}(?:_bucket)?{{(.*)}}", published, re.M)
        }
        assert set(re.findall(r"\w+", labels)) == set(seen) and set(seen) >= OUR_LABELS
    assert frontend.count("`ngpt_openai_") == 5
    # Triton's own, further below.
    for name in re.findall(r"`(nv_\w+)", guide):
        assert name in published or name in ELSEWHERE, name


def test_dashboard_alerts_and_autoscaler_ask_for_what_there_is(published):
    """By name; counters through what they have become in some time, and everything else as it is."""
    pytest.importorskip("promql_parser", reason="promql-parser is not installed: pip install -e '.[dev]'")
    there = kinds(published)
    asked = [selector for expression in everywhere() for selector in selectors(expression)]
    for name, _, function in asked:
        assert name in there or name in ELSEWHERE, name
        if name in there:
            assert (there[name] == "counter") == (function in ("rate", "increase", "resets")), (name, function)
    ours = {name.removesuffix("_bucket") for name, _, _ in asked if name.startswith("ngpt_")}
    assert ours == set(re.findall(r"^# TYPE (ngpt_\w+) ", published, re.M))
    # The label of the rule that knows a dead process.
    (reason,) = {matchers["reason"] for name, matchers, _ in asked if "reason" in matchers}
    assert f'nv_inference_request_failure{{model="ensemble",reason="{reason}"' in published


def test_no_alert_takes_the_processes_of_one_model_apart():
    """`instance` is the server; one process of a model is `model_instance`."""
    for rule in rules():
        if "ngpt_" in rule["expr"]:
            assert re.findall(r" by \((.*?)\)", rule["expr"]), rule["alert"]
            assert all(by.startswith("namespace, pod, instance, model") for by in re.findall(r" by \((.*?)\)", rule["expr"]))
