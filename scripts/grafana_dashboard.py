#!/usr/bin/env python3
"""Print the Grafana dashboard of deploy/grafana/ngpt.json, or put it there.

python scripts/grafana_dashboard.py            # print
python scripts/grafana_dashboard.py --write
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parents[1] / "deploy" / "grafana" / "ngpt.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# "All" is .* and not a list: a Prometheus outside a cluster adds no namespace.
SERVER = 'namespace=~"$namespace", instance=~"$instance"'
MODEL = f'{SERVER}, model=~"$model", version=~"$version"'
WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """A chart: its queries as legend -> PromQL, the unit in Grafana's spelling, and what a reader has to know."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    about: str = ""
    top: float | None = None
    kind: str = "timeseries"
    width: int = 8


def _rate(name: str, by: str = "", where: str = MODEL) -> str:
    return f"sum{f' by ({by}) ' if by else ''}(rate({name}{{{where}}}[{WINDOW}]))"


def _total(name: str, by: str = "", where: str = MODEL) -> str:
    return f"sum{f' by ({by}) ' if by else ''}({name}{{{where}}})"


def _first_token(quantile: float) -> str:
    return f"histogram_quantile({quantile}, {_rate('ngpt_first_token_seconds_bucket', 'le')})"


_ENDED = " + ".join(_rate(f"ngpt_requests_{end}") for end in ("completed", "cancelled", "failed"))

ROWS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        Panel("Servers", {"": f"count({_total('ngpt_slots', 'namespace, instance')})"}, kind="stat", width=4),
        Panel("Requests that hold a slot", {"": _total("ngpt_requests_active")}, kind="stat", width=5),
        Panel("Requests that wait", {"": _total("ngpt_requests_queued")}, kind="stat", width=5),
        Panel("Tokens out", {"": _rate("ngpt_generated_tokens")}, "tps", kind="stat", width=5),
        Panel("Failed in an hour", {"": f"sum(increase(ngpt_requests_failed{{{MODEL}}}[1h]))"}, kind="stat", width=5),
    ),
    "Load": (
        Panel(
            "Requests",
            {
                "hold a slot": _total("ngpt_requests_active"),
                "wait": _total("ngpt_requests_queued"),
                "slots": _total("ngpt_slots"),
            },
            about="When requests wait for long while slots are free, the server hangs.",
        ),
        Panel(
            "Queue, part of its limit",
            {
                "{{namespace}} {{instance}} {{model}}": _total("ngpt_requests_queued", "namespace, instance, model")
                + " / "
                + _total("ngpt_queue_limit", "namespace, instance, model")
            },
            "percentunit",
            "At 1 further requests are refused. The limit is `package --max-queue`.",
            top=1,
        ),
        Panel(
            "Requests that ended",
            {end: _rate(f"ngpt_requests_{end}") for end in ("completed", "cancelled", "rejected", "failed")},
            "reqps",
            "Rejected: the queue was full, or the request cannot be served. Cancelled: the client went, or asked for it.",
        ),
    ),
    "Speed": (
        Panel(
            "Tokens",
            {"in (prompts)": _rate("ngpt_prompt_tokens"), "out (generated)": _rate("ngpt_generated_tokens")},
            "tps",
        ),
        Panel(
            "Time to the first token",
            {"p50": _first_token(0.5), "p95": _first_token(0.95), "p99": _first_token(0.99)},
            "s",
            "From a request's arrival, noted when it ends. Above 10 s, the last bucket, it stays at 10 s. Servers without "
            "histograms publish none, and this is empty: see the mean wait beside it.",
        ),
        Panel(
            "Mean wait for a slot",
            {"wait": f"sum(avg_over_time(ngpt_requests_queued{{{MODEL}}}[{WINDOW}])) / ({_ENDED})"},
            "s",
            "An estimate: requests that wait, divided by those that end in a second. It needs no histogram.",
        ),
        Panel(
            "Tokens out for each request that holds a slot",
            {"each": f"{_rate('ngpt_generated_tokens')} / sum(avg_over_time(ngpt_requests_active{{{MODEL}}}[{WINDOW}]))"},
            "tps",
            "What one reader sees. Time spent on prompts counts, too.",
        ),
    ),
    "Triton": (
        Panel(
            "Requests taken",
            {"{{model}}": _rate("nv_inference_request_success", "model", SERVER)},
            "reqps",
            "Triton counts a request to a decoupled model when the model has taken it, also if the model then refuses it.",
        ),
        Panel(
            "Requests that Triton failed",
            {"{{model}} {{reason}}": _rate("nv_inference_request_failure", "model, reason", SERVER) + " > 0"},
            "reqps",
            "BACKEND: the model's process is dead. OTHER, of tensorrt_llm: what its model refused.",
        ),
        Panel("Requests that wait in Triton", {"{{model}}": _total("nv_inference_pending_request_count", "model", SERVER)}),
        Panel(
            "Processor",
            {"{{instance}}": f"nv_cpu_utilization{{{SERVER}}}"},
            "percentunit",
            "Of the whole machine.",
            top=1,
        ),
        Panel(
            "Memory in use",
            {"{{instance}}": f"nv_cpu_memory_used_bytes{{{SERVER}}}"},
            "bytes",
            "Of the whole machine.",
        ),
    ),
    "GPU (where Triton sees one)": (
        Panel("GPU use", {"{{instance}} {{gpu_uuid}}": f"nv_gpu_utilization{{{SERVER}}}"}, "percentunit", top=1),
        Panel(
            "GPU memory in use",
            {
                "{{instance}} {{gpu_uuid}}": f"nv_gpu_memory_used_bytes{{{SERVER}}}",
                "there is, {{instance}} {{gpu_uuid}}": f"nv_gpu_memory_total_bytes{{{SERVER}}}",
            },
            "bytes",
        ),
        Panel("GPU power", {"{{instance}} {{gpu_uuid}}": f"nv_gpu_power_usage{{{SERVER}}}"}, "watt"),
    ),
}


def _panel(panel: Panel, number: int, x: int, y: int, height: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.top is not None:
        defaults["max"] = panel.top
    targets = [
        {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend or "__auto", "datasource": SOURCE}
        for index, (legend, expression) in enumerate(panel.queries.items())
    ]
    found = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": targets,
    }
    if panel.kind == "stat":
        found["options"] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "graphMode": "area"}
    if panel.about:
        found["description"] = panel.about
    return found


def _variable(name: str, label: str, within: str) -> dict[str, Any]:
    query = f"label_values(ngpt_slots{{{within}}}, {name})" if within else f"label_values(ngpt_slots, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    """The dashboard in the form that Grafana imports and its sidecar loads."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        where = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": where, "panels": []})
        x, y = 0, y + 1
        height = 4 if row[0].kind == "stat" else 8
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + height
            panels.append(_panel(panel, len(panels) + 1, x, y, height))
            x += panel.width
        y += height
    names = ("namespace", "model", "version", "instance")
    within = ["", *(", ".join(f'{name}=~"${name}"' for name in names[:count]) for count in (1, 2, 3))]
    variables = [_variable(name, name, inside) for name, inside in zip(names, within, strict=True)]
    source = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
    }
    return {
        "uid": "ngpt-deploy",
        "title": "nGPT",
        "description": "Models served by ngpt-deploy. Made by scripts/grafana_dashboard.py.",
        "tags": ["ngpt", "triton"],
        "timezone": "browser",
        "editable": True,
        "graphTooltip": 1,
        "schemaVersion": 39,
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [source, *variables]},
        "annotations": {"list": []},
        "panels": panels,
    }


def text() -> str:
    """As it stands in the file."""
    return json.dumps(dashboard(), indent=1) + "\n"


def main() -> None:
    """See the module's text."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write", action="store_true", help="put it into deploy/grafana/ngpt.json")
    if options.parse_args().write:
        DASHBOARD.write_text(text(), encoding="utf-8")
    else:
        print(text(), end="")


if __name__ == "__main__":
    main()
