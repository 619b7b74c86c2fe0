"""The short form of scripts/mutations.py: a few faults in each lowering are caught, by name; and what is published is what there is."""

import dataclasses
import json

import pytest

from export.taps import position_of
from scripts.mutations import RESULTS, main
from tests.mutations import publish
from tests.mutations.lowerings import LOWERINGS
from tests.mutations.proof import Cell, by_name, expected, judged, proof
from tests.mutations.table import FAITHFUL, MUTATIONS

CHOSEN = {
    "onnx fused, fp32": ("eps-floor", "row-not-reset", "last-but-one", "rows-not-moved"),
    "onnx fused, int4": ("block-doubled",),
    "onnx portable": ("keys-cached-raw",),
    "tensorrt, fp32": ("rotation-interleaved",),
    "tensorrt-llm, fp32": ("update-not-normalised",),
}


@pytest.fixture(scope="module")
def running():
    with proof() as running:
        yield running


@pytest.mark.parametrize(("lowering", "name"), [(lowering, name) for lowering, names in CHOSEN.items() for name in names])
def test_a_fault_is_caught_and_the_first_tap_that_is_named_is_the_right_one(running, lowering, name):
    mutation = by_name(name)
    right = running.faithful(mutation.checkpoint, lowering)
    assert right.verdict == "pass", right.failed
    found = judged(mutation, running.cell(mutation, lowering))
    assert found.right and found.caught, found.said


def test_what_is_published_is_whole_right_and_what_the_guides_show():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert publish.stale(results) == [], "run python scripts/mutations.py, then with --write"
    assert [each["said"] for each in results["engines"] if not each["right"]] == []
    caught = {each["mutation"] for each in results["engines"] if each["verdict"] == "fail"}
    assert caught == {each.name for each in MUTATIONS}


def test_a_gate_that_is_blind_or_names_the_wrong_place_is_told():
    mutation, taps = by_name("head-zeroed"), ("layers.0.attn.update", "layers.1.attn.update", "layers.1.mlp.update")
    cell = Cell("head-zeroed", "gqa", "onnx portable", "fail", 9.0, ("prefill: x", "angle at y"), "layers.1.attn.update", taps)
    assert judged(mutation, cell).right
    assert "first tap" in judged(mutation, dataclasses.replace(cell, named="layers.1.mlp.update")).said
    assert not judged(mutation, dataclasses.replace(cell, verdict="pass")).right
    assert judged(mutation, dataclasses.replace(cell, verdict="pass", effect=0.5)).right
    late = dataclasses.replace(cell, named=None)
    assert judged(by_name("late-positions"), late).said == "prefill blamed"
    assert not judged(FAITHFUL, cell).right


def test_faults_have_names_of_their_own_and_places_that_there_are():
    assert len({each.name for each in MUTATIONS}) == len(MUTATIONS) >= 40
    for each in MUTATIONS:
        assert each.first is None or position_of(each.first)
        assert bool(each.without) == any(not each.applies(make().kinds) for make in LOWERINGS.values()), each.name
    assert expected("layers.1.attn.o", ("embed", "layers.1.mlp.update", "layers.1.attn.update")) == "layers.1.attn.update"


def test_the_command_lists_runs_and_refuses(tmp_path, capsys):
    assert main(["--list"]) == 0 and "scale-divided" in capsys.readouterr().out
    output = tmp_path / "results.json"
    assert main(["--only", "sz-unscaled", "--lowering", "onnx portable", "--output", str(output)]) == 0
    (right, faulty) = json.loads(output.read_text())["engines"]
    assert (right["verdict"], faulty["verdict"], faulty["caught_by"]) == ("pass", "fail", ["prefill", "decode"])
    with pytest.raises(SystemExit):
        main(["--only", "nonsense"])
    assert "scale-divided" in capsys.readouterr().err
