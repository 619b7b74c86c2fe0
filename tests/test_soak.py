"""scripts/soak.py in its short form: the real server under load, faults and hostile requests keeps its word."""

import json
import subprocess
import sys

import pytest

from scripts import soak
from tests.conftest import ROOT

PARTS = {"load", "overload", "hostile", "hostile, by OpenAI's interface"}


def test_a_short_soak_finds_nothing(tiny_engine_folder, tmp_path):
    figures = tmp_path / "soak.json"
    words = ["--engine", str(tiny_engine_folder), "--short", "--write", str(figures)]
    run = subprocess.run([sys.executable, "scripts/soak.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    found = json.loads(figures.read_text())
    assert set(found) >= PARTS and "NOT AS IT SHOULD BE" not in run.stdout
    for part, numbers in found.items():
        assert numbers.get("right", 1) > 0 or "kill" in part, part
    assert found["hostile"]["grpc: refused"] > 300 and found["kill -9 of a model"]["error"] > 0
    assert found["reload"]["right"] == found["unload"]["right"] == found["SIGTERM"]["right"] == found["SIGTERM"]["streams"]


@pytest.mark.parametrize("wrong", [{"wrong": 1}, {"hung": 1}, {"slots held at the end": 1.0}, {"untyped": 1}, {"paths or tracebacks": 2},
                                   {"memory before, MB": 100, "memory after, MB": 300}, {"grown in the last quarter, MB": 9}])  # fmt: skip
def test_what_must_not_be_is_seen(wrong):
    assert soak.good({"right": 5, "error": 3, "hung": 0}) and not soak.good({"right": 5} | wrong)
