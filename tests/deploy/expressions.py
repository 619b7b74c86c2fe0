"""Every PromQL expression in deploy/: of the dashboard, of the alert rules, of the autoscaler's adapter."""

import json
import re

import yaml

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
VARIABLES = {"$__rate_interval": "5m", "$namespace": ".*", "$instance": ".*", "$model": ".*", "$version": ".*"}


def dashboard():
    return json.loads((DEPLOY / "grafana" / "ngpt.json").read_text())


def rules():
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    return group["rules"]


def filled(expression):
    """As Grafana sends it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def of_the_dashboard():
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    labels = [variable["query"]["query"] for variable in dashboard()["templating"]["list"] if variable["type"] == "query"]
    return [filled(query) for query in (*queries, *(re.fullmatch(r"label_values\((.*), \w+\)", text)[1] for text in labels))]


def of_the_adapter():
    """The series that it looks for, and its queries as it sends them."""
    found = []
    for rule in yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]:
        series = re.match(r"\w+", rule["seriesQuery"])[0]
        query = rule["metricsQuery"].replace("<<.Series>>", series).replace("<<.GroupBy>>", "pod")
        found += [rule["seriesQuery"], query.replace("<<.LabelMatchers>>", 'namespace="prod",pod=~"a|b"')]
    return found


def everywhere():
    return [*of_the_dashboard(), *(rule["expr"] for rule in rules()), *of_the_adapter()]


def selectors(expression):
    """Of each selector: the metric, its matchers, and the function over a range, None where the value is taken as it is."""
    import promql_parser

    found, inside = [], []

    def visit(node):
        if isinstance(node, promql_parser.Call):
            ranges = [argument.vector_selector for argument in node.args if isinstance(argument, promql_parser.MatrixSelector)]
            found.extend((inner.name, _labels(inner), node.func.name) for inner in ranges)
            inside.extend(str(inner) for inner in ranges)
        elif isinstance(node, promql_parser.VectorSelector):
            if str(node) in inside:  # the one of a range, which is visited after it
                inside.remove(str(node))
            else:
                found.append((node.name, _labels(node), None))

    promql_parser.walk(promql_parser.parse(expression), pre_visit=visit)
    assert not inside
    return found


def _labels(selector):
    return {matcher.name: matcher.value for matcher in selector.matchers.matchers}
