"""scripts/hostile_files.py in its short form: every reader refuses spoiled files in words; and the script would see one that does not."""

import os
import random
import signal
import time

import pytest

from engines.runtime.errors import EngineFileError, ServingError
from engines.target import Gpu, load_target
from ngpt.errors import NGPTDeployError, TargetError
from scripts import hostile_files
from scripts.hostility import mutations, workers
from scripts.hostility.readers import READERS, Goods, Reader, typed
from scripts.hostility.workers import make, run


@pytest.fixture(scope="module")
def goods(tmp_path_factory):
    return Goods.make(tmp_path_factory.mktemp("goods"))


def test_spoiled_files_for_every_reader_end_in_words(goods, tmp_path):
    cases = [(reader, number) for reader in READERS for number in range(max(12, int(400 * READERS[reader].share)))]
    outcomes = list(run(goods, tmp_path, cases, 3, workers=2, limit=60.0))
    assert [outcome for outcome in outcomes if not hostile_files.good(outcome)] == []
    assert sorted(outcome.case for outcome in outcomes) == sorted(cases)
    for reader in READERS:  # a reader that refuses everything would be no test, and one that takes everything no reader
        assert {outcome.end for outcome in outcomes if outcome.case[0] == reader} >= {"typed"}, reader
    assert sum(outcome.end == "accepted" for outcome in outcomes) > 15
    assert "| all |" in hostile_files.table(outcomes)


def contents(folder):
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else "other"
        for path in sorted(folder.rglob("*"))
        if not path.is_file() or path.is_symlink() or path.stat().st_size < 1 << 21
    }


@pytest.mark.parametrize("reader", READERS)
def test_a_case_is_the_same_whenever_it_is_made(reader, goods, tmp_path):
    seen = []
    for number in range(4):
        for _ in range(2):
            make(goods, tmp_path / "case", (reader, number), 0)
            seen.append(contents(tmp_path / "case"))
        assert seen[-1] == seen[-2]
    assert any(seen[0] != other for other in seen)


def hang(*_):
    time.sleep(60)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def unknown(*_):
    raise KeyError("of nobody")


def unshowable(*_):
    error = EngineFileError("x")
    error.what = "\x1b[31m"
    raise error


def large(*_):
    bytearray(700 << 20)


WRONG = {
    "hangs": (hang, "hung"),
    "dies": (die, "died"),
    "untyped": (unknown, "untyped"),
    "unshowable": (unshowable, "untyped"),
    "large": (large, "typed"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_reader_that_fails_is_seen_and_the_next_file_is_read(what, tmp_path, monkeypatch):
    """The readers are doubles."""
    function, end = WRONG[what]

    def write(goods, folder, pick):
        (folder / "bad").write_text(str(pick.random() < 0.5))

    def read(goods, folder):
        if (folder / "bad").read_text() == "True":
            function()
        raise NGPTDeployError("refused")

    monkeypatch.setitem(READERS, "double", Reader(1.0, write, read))
    cases = [("double", number) for number in range(3)]
    bad = [random.Random(f"0 double {number}").random() < 0.5 for _, number in cases]
    assert 0 < sum(bad) < 3
    outcomes = list(run(Goods(tmp_path), tmp_path / "scratch", cases, 0, workers=1, limit=1.5 if end == "hung" else 60.0))
    wrong = [outcome for outcome in outcomes if not hostile_files.good(outcome)]
    assert len(outcomes) == 3 and [outcome.end for outcome in wrong] == [end] * sum(bad)


def test_what_is_typed_can_be_shown():
    assert (
        typed(ServingError("a\x1b\ud800", found="\u202e" * 9000, remedy="\U000e0001" * 9000))
        and len(str(ServingError("x" * 10**6))) < 5000
    )
    assert not typed(ValueError("x"))


# What the script found, and what is refused since then


def test_numbers_beyond_float64_in_a_target_are_refused(tmp_path):
    for number in (10**400, 1 << 20_000, float("nan"), float("inf")):
        with pytest.raises(TargetError, match="a number above 0"):
            Gpu("9.0", number, 1.0)
    with pytest.raises(TargetError, match="a whole number of 20000 bits"):
        Gpu("9.0", 1 << 19_999, 1.0)
    (tmp_path / "x.toml").write_text("runtime = 0x" + "f" * 5000)
    with pytest.raises(TargetError):
        load_target(tmp_path / "x.toml")


def test_a_manifest_whose_target_lacks_its_precision_is_refused(goods):
    import json

    from engines.runtime.manifest import Manifest

    for place, key in (
        ("target", "precision"),
        ("target", "runtime"),
        (None, "schema_version"),
        (None, "graph"),
        ("model", "head_dim"),
    ):
        data = json.loads((goods.engine / "manifest.json").read_text())
        del (data if place is None else data[place])[key]
        with pytest.raises(EngineFileError, match=key):
            Manifest.from_dict(data)


def test_a_report_that_cannot_be_drawn_or_written_is_none(goods):
    import json

    from engines.parity.report import ParityReport

    good = json.loads((goods.engine / "parity.json").read_text())
    ParityReport.from_dict(good)
    first, *others = good["checks"]
    for change in ({"name": "\ud800"}, {"limit": 10**400}, {"limit": "large"}, {"sample": -(2**70) / 3}):
        with pytest.raises(EngineFileError, match="not a parity report"):
            ParityReport.from_dict(good | {"checks": [first | change, *others]})
    refused = 0
    for key in good["summary"]:
        try:
            ParityReport.from_dict(good | {"summary": good["summary"] | {key: 1.5}}).to_html()
        except EngineFileError:
            refused += 1
    assert refused  # those that the page takes for tables


def test_a_pipe_in_the_place_of_a_report_is_not_waited_for(tmp_path):
    from engines.runtime.verdict import read_report

    os.mkfifo(tmp_path / "parity.json")
    with pytest.raises(EngineFileError, match="something that is no file"):
        read_report(tmp_path / "parity.json")


def test_a_folder_is_emptied_of_whatever_is_in_it(tmp_path):
    for number in range(40):
        (tmp_path / "case").mkdir(exist_ok=True)
        mutations.misplace(tmp_path / "case" / "file", random.Random(number))
        (tmp_path / "case" / "inner").mkdir()
        (tmp_path / "case" / "inner" / "up").symlink_to("../..")
        workers.clear(tmp_path / "case")
        assert list((tmp_path / "case").iterdir()) == [] and (tmp_path / "case").is_dir()
