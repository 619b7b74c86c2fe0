"""Dashboard, alert rules, and the chart's objects that carry them. Prometheus' own tools judge the rules where they are installed."""

import copy
import functools
import json
import shutil
import subprocess

import helm_python
import pytest
import yaml

from scripts import grafana_dashboard
from tests.deploy.expressions import DEPLOY, dashboard, everywhere, of_the_adapter, of_the_dashboard, rules, selectors
from tests.deploy.test_chart import CHART, pods

CASES = DEPLOY.parent / "tests" / "deploy" / "alerts_test.yaml"


def test_the_dashboard_is_what_the_script_makes():
    assert grafana_dashboard.DASHBOARD.read_text() == grafana_dashboard.text(), "run: python scripts/grafana_dashboard.py --write"


def lost(given, kept, path=""):
    """What Grafana's own types do not keep: names that they do not know, values that they change."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            problem
            for key, value in given.items()
            for problem in (lost(value, kept[key], f"{path}/{key}") if key in kept else [f"{path}/{key}"])
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [problem for index, pair in enumerate(zip(given, kept, strict=True)) for problem in lost(*pair, f"{path}/{index}")]
    return [] if given == kept else [path]


def test_the_dashboard_fits_grafanas_types():
    """Those of Grafana's SDK. They take values of wrong types; names that they do not know are lost."""
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed: pip install -e '.[dev]'")
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()

    def through(given):
        return json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(given))))

    given = dashboard()
    assert not lost(given, through(given))
    given["panels"][1]["gridPoz"] = given["panels"][1]["fieldConfig"]["defaults"]["units"] = 1
    assert lost(given, through(given)) == ["/panels/1/fieldConfig/defaults/units", "/panels/1/gridPoz"]


def test_panels_lie_beside_each_other_and_say_what_they_show():
    found = dashboard()["panels"]
    assert sorted(panel["id"] for panel in found) == list(range(1, len(found) + 1))
    cells = [
        (x, y)
        for where in (panel["gridPos"] for panel in found)
        for x in range(where["x"], where["x"] + where["w"])
        for y in range(where["y"], where["y"] + where["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    for panel in found:
        targets = panel.get("targets", ())
        assert panel["title"] and (targets or panel["type"] == "row")
        assert len({target["refId"] for target in targets}) == len({target["legendFormat"] for target in targets}) == len(targets)
    (first,) = [panel for panel in found if panel["title"] == "Time to the first token"]
    assert "without histograms" in first["description"]


def test_every_panel_follows_the_variables():
    names = {variable["name"] for variable in dashboard()["templating"]["list"]}
    assert names == {"datasource", "namespace", "model", "version", "instance"}
    queries = [(target["expr"], target["datasource"]) for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 20
    for query, source in queries:
        assert source["uid"] == "${datasource}" and query.count("{") == query.count('namespace=~"$namespace"')
        assert query.count("{") == query.count('instance=~"$instance"')
        assert query.count("ngpt_") == query.count('model=~"$model"') == query.count('version=~"$version"')
    assert len(of_the_dashboard()) == len(queries) + 4


def test_every_expression_is_one():
    promql = pytest.importorskip("promql_parser", reason="promql-parser is not installed: pip install -e '.[dev]'")
    for expression in everywhere():
        assert selectors(expression), expression
    for wrong in ("rate(ngpt_slots)", "sum(ngpt_slots", "histogram_quantil(0.5, ngpt_slots)", "ngpt_slots{model=~'('}"):
        with pytest.raises((ValueError, RuntimeError)):
            promql.parse(wrong)


def test_every_alert_says_what_to_do_and_has_a_case_that_fires_and_one_that_does_not():
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) == 9 and all(name.startswith("Ngpt") for name in names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
    asked = [case for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in asked if case.get("exp_alerts")} == set(names)
    assert {case["alertname"] for case in asked if not case.get("exp_alerts")} == set(names)


@pytest.mark.parametrize(
    "arguments", [("check", "rules", DEPLOY / "alerts.yaml"), ("test", "rules", CASES)], ids=["check", "test"]
)
def test_promtool_agrees(arguments):
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: it is in Debian's package prometheus")
    run = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=CASES.parent)
    assert run.returncode == 0 and "SUCCESS" in run.stdout + run.stderr, run.stdout + run.stderr


def test_the_adapter_sums_over_what_the_model_adds():
    """A pod has one number, whatever models, versions and processes it has."""
    queries = of_the_adapter()[1::2]
    assert all(query.startswith("sum(") and query.endswith(") by (pod)") for query in queries)


@functools.cache
def watched(scrape="PodMonitor", multinode=False):
    """Objects by kind, with everything that there is to see."""
    values = {"scrape": scrape, "rules": True, "dashboard": True, "labels": {"release": "prometheus"}}
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render({"monitoring": values, "multiNode": {"enabled": multinode}}, name="demo", namespace="prod")
    return {found["kind"]: found for text in files.values() for found in yaml.safe_load_all(text) if found}


def test_the_chart_carries_the_files_that_lie_beside_it():
    objects = watched()
    assert objects["PrometheusRule"]["spec"] == yaml.safe_load((DEPLOY / "alerts.yaml").read_text())
    assert objects["PrometheusRule"]["metadata"]["labels"]["release"] == "prometheus"
    assert json.loads(objects["ConfigMap"]["data"]["ngpt.json"]) == dashboard()
    assert objects["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"


@pytest.mark.parametrize("multinode", [False, True])
@pytest.mark.parametrize("kind", ["PodMonitor", "ServiceMonitor"])
def test_what_serves_is_scraped_once(kind, multinode):
    """Field names as in the CRDs monitoring.coreos.com/v1."""
    objects = watched(kind, multinode)
    assert {"PodMonitor", "ServiceMonitor"} & set(objects) == {kind}
    spec = objects[kind]["spec"]
    (endpoint,) = spec["podMetricsEndpoints" if kind == "PodMonitor" else "endpoints"]
    assert set(endpoint) == {"port", "interval", "relabelings"} and endpoint["interval"] == "15s"
    assert endpoint["relabelings"] == [{"action": "replace", "targetLabel": "job", "replacement": "ngpt"}]
    wanted = set(spec["selector"]["matchLabels"].items())
    if kind == "PodMonitor":
        templates = pods(objects)
        found = [role for role, template in templates.items() if wanted <= set(template["metadata"]["labels"].items())]
        assert found == [role for role in templates if role != "worker"]
        named = {port["name"] for port in templates[found[0]]["spec"]["containers"][0]["ports"]}
    else:
        assert wanted <= set(objects["Service"]["metadata"]["labels"].items())
        named = {port["name"] for port in objects["Service"]["spec"]["ports"]}
    assert endpoint["port"] in named
    # Whoever goes by these would read the same numbers once more.
    assert not any("annotations" in template["metadata"] for template in pods(objects).values())


def test_nothing_of_this_is_there_unasked():
    with helm_python.Chart.load(str(CHART)) as chart:
        files = chart.render({}, name="demo", namespace="prod")
    kinds = {found["kind"] for text in files.values() for found in yaml.safe_load_all(text) if found}
    assert kinds == {"Deployment", "Service", "PodDisruptionBudget"}
