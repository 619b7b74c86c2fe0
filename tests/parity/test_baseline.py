"""The regression file: what is recorded, what counts as worse, what is refused."""

import dataclasses
import json
import math
import re

import pytest

from engines.parity.baseline import (
    Entry,
    Figure,
    check_positions,
    compare,
    entry_of,
    figures_of,
    read_baseline,
    table,
    write_baseline,
)
from engines.runtime.errors import EngineFileError
from engines.runtime.manifest import FileEntry, read_manifest
from ngpt.errors import BuildError
from tests.conftest import ROOT
from tests.parity.test_report import made

SIZE = "size of the engine, bytes"
DECODE = "speed against PyTorch: decode"


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(ROOT / "tests" / "data" / "engine-0.1")


def outcomes(entry, now):
    return {move.name: move.outcome for move in compare(entry, now)}


def test_figures_are_ratios_to_the_noise_the_size_and_what_was_timed(manifest):
    report = made()
    found = figures_of(report, manifest, {"decode": 7.0})
    assert found["error / noise, prefill: sqrt(KL), mean"] == 1.0 and found[DECODE] == 7.0
    assert (
        found["error / noise, values inside, mean: largest"] == 1.0
        and "error / noise, values inside, mean: median of 28" in found
    )
    assert found[SIZE] == sum(entry.bytes for name, entry in manifest.files.items() if not name.startswith("parity."))
    assert not any("finite" in name or "first choice" in name for name in found)
    bigger = dataclasses.replace(manifest, files={**manifest.files, "more.bin": FileEntry(1000, "0" * 64)})
    assert figures_of(report, bigger)[SIZE] == found[SIZE] + 1000


def test_the_noise_of_a_figure_is_measured_over_runs(manifest):
    runs = [{"a": 1.0, DECODE: 10.0}, {"a": 1.1, DECODE: 30.0}, {"a": 0.9, DECODE: 20.0}]
    entry = entry_of(manifest, made(), runs)
    assert entry.figures["a"].value == 1.0, "the first run is the one that is run again"
    assert entry.figures["a"].noise == pytest.approx(0.1, rel=0.01)
    assert entry.figures[DECODE].value == 20.0
    assert entry_of(manifest, made(), runs[:1]).figures["a"].noise == 0.0


@pytest.mark.parametrize(
    ("noise", "now", "outcome"),
    [
        (0.0, 1.14, "same"), (0.0, 1.17, "worse"), (0.0, 0.85, "better"),
        (0.1, 1.45, "same"), (0.1, 1.55, "worse"), (0.1, 0.6, "better"),
    ],
)  # fmt: skip
def test_a_parity_figure_is_worse_beyond_four_times_its_noise_and_never_within_the_floor(noise, now, outcome):
    (move,) = compare(Entry("int8", 1, {"kl": Figure(1.0, noise)}), {"kl": now})
    assert move.outcome == outcome and move.worse == (outcome == "worse")


def test_a_smaller_speed_is_worse_and_a_larger_size_is():
    entry = Entry("int8", 1, {DECODE: Figure(10.0, 0.05), SIZE: Figure(1000.0, 0.0)})
    assert outcomes(entry, {DECODE: 12.5, SIZE: 900.0}) == {DECODE: "better", SIZE: "better"}
    assert outcomes(entry, {DECODE: 8.0, SIZE: 1011.0}) == {DECODE: "worse", SIZE: "worse"}
    assert outcomes(entry, {DECODE: 9.0, SIZE: 1009.0}) == {DECODE: "same", SIZE: "same"}


def test_what_is_missing_is_a_regression_unless_it_was_not_timed():
    entry = Entry("int8", 1, {DECODE: Figure(10.0, 0.1), "kl": Figure(1.0, 0.1)})
    found = compare(entry, {"other": 1.0})
    assert [(move.name, move.outcome, move.worse) for move in found] == [
        (DECODE, "not measured", False), ("kl", "gone", True), ("other", "new", False),
    ]  # fmt: skip


def test_the_table_says_what_moved_by_how_many_times_its_noise_worst_first():
    entry = Entry("int8", 1, {"a": Figure(1.0, 0.1), "b": Figure(1.0, 0.02), SIZE: Figure(1000.0, 0.0)})
    lines = table(compare(entry, {"a": 1.02, "b": 1.5, SIZE: 1000.0})).splitlines()
    assert lines[1].startswith("b ") and "+50.0%" in lines[1] and lines[1].endswith("worse")
    assert f"{math.log(1.5) / 0.02:.1f} times the noise" in lines[1]
    assert re.search(r"^a .*\+2\.0% +10\.0% +0\.2 times the noise +same$", lines[2]) and "equal" in lines[3]
    assert len({line.rindex(line.split()[-1]) + len(line.split()[-1]) for line in lines[1:]}) == 1, "columns are aligned"


def test_a_file_keeps_its_other_targets_and_comes_back_as_it_was(manifest, tmp_path):
    path, entry = (
        tmp_path / "new" / "baseline.json",
        Entry(manifest.target.precision, 160, {"a": Figure(1.25, 0.01), SIZE: Figure(12345.0, 0.0)}),
    )
    write_baseline(path, manifest, entry)
    other = dataclasses.replace(manifest, target=dataclasses.replace(manifest.target, name="other"))
    write_baseline(path, other, entry)
    assert read_baseline(path, manifest) == entry == read_baseline(path, other)
    write_baseline(path, other, dataclasses.replace(entry, positions=7))
    assert read_baseline(path, manifest).positions == 160 and read_baseline(path, other).positions == 7
    assert [found.name for found in path.parent.iterdir()] == ["baseline.json"]


def test_a_baseline_of_something_else_is_refused_by_name(manifest, tmp_path):
    path = tmp_path / "baseline.json"
    write_baseline(path, manifest, Entry(manifest.target.precision, 160, {"a": Figure(1.0, 0.1)}))

    def changed(**fields):
        return dataclasses.replace(manifest, target=dataclasses.replace(manifest.target, **fields))

    with pytest.raises(EngineFileError, match=f"nothing of this target.*expected h100, found {manifest.target.name}"):
        read_baseline(path, changed(name="h100"))
    with pytest.raises(EngineFileError, match="another precision.*expected fp8"):
        read_baseline(path, changed(precision="fp8"))
    foreign = dataclasses.replace(manifest, digests=manifest.digests | {"weights": "sha256:other"})
    for act in (lambda: read_baseline(path, foreign), lambda: write_baseline(path, foreign, Entry("x", 1))):
        with pytest.raises(EngineFileError, match="another checkpoint.*sha256:other"):
            act()
    with pytest.raises(EngineFileError, match="other tokens.*expected 160 positions, found 7"):
        check_positions(path, Entry("x", 7), made())
    check_positions(path, Entry("x", 160), made())


HOSTILE = {
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "another version": {"schema_version": 2},
    "a number that is no number": {"value": "1"},
    "zero": {"value": 0},
    "below zero": {"value": -1.0},
    "huge": {"value": 1e300},
    "infinite": {"value": math.inf},
    "NaN": {"value": math.nan},
    "true": {"value": True},
    "a noise below zero": {"noise": -0.1},
    "a name that steers": {"name": "\x1b[31m"},
    "a long name": {"name": "x" * 1000},
    "an empty name": {"name": ""},
    "many": {"many": 5000},
    "targets that are a list": {"targets": []},
    "no checkpoint": {"checkpoint": None},
    "large": b" " * (2 << 20),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_an_error_in_words(case, manifest, tmp_path):
    change, path = HOSTILE[case], tmp_path / "baseline.json"
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        figure = {"value": 1.0, "noise": 0.1} | {key: change[key] for key in ("value", "noise") if key in change}
        names = [change.get("name", "a"), *(f"a{i}" for i in range(change.get("many", 0)))]
        entry = {"precision": manifest.target.precision, "positions": 1, "figures": dict.fromkeys(names, figure)}
        data = {"schema_version": 1, "checkpoint": manifest.digests["weights"], "targets": {manifest.target.name: entry}}
        data |= {key: change[key] for key in ("schema_version", "targets", "checkpoint") if key in change}
        path.write_text(json.dumps(data))
    before = path.read_bytes()
    for act in (lambda: read_baseline(path, manifest), lambda: write_baseline(path, manifest, Entry("x", 1))):
        with pytest.raises(EngineFileError) as raised:
            act()
        assert "\x1b" not in str(raised.value) and len(str(raised.value)) < 1500
    assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(manifest, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((BuildError, EngineFileError), match="file"):
        write_baseline(tmp_path / "file" / "b.json", manifest, Entry("x", 1))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
