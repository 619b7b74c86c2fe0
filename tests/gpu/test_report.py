"""gpu_check without a GPU: sections that cannot take each other down, the table, the JSON, the exit status."""

import json

import pytest

from scripts import gpu_check
from scripts.gpu.machine import architecture, describe
from scripts.gpu.report import Row, Unavailable, run_sections, table


def good():
    yield Row("good", "speed", 12345.678, "tok/s")


def breaks_half_way():
    yield Row("bad", "first", 1.0)
    raise ValueError("two\nlines")


def missing():
    raise Unavailable("no such device")
    yield


def quiet(text):
    pass


def test_a_section_that_fails_keeps_its_rows_and_stops_no_other():
    rows = run_sections({"bad": breaks_half_way, "missing": missing, "good": good}, quiet)
    assert [(r.section, r.what, r.verdict) for r in rows] == [
        ("bad", "first", "measured"), ("bad", "stopped", "FAILED"), ("missing", "not run", "skipped"), ("good", "speed", "measured"),
    ]  # fmt: skip
    assert rows[1].note == "ValueError: two lines" and rows[2].note == "no such device"


def test_table_lines_up():
    lines = table(
        [Row("a", "a long description", 0.123456, "of copy", "ok", "why"), Row("section", "b", verdict="skipped")]
    ).split("\n")
    assert lines[0].startswith("section  what") and set(lines[1]) == {"-", " "}
    column = lines[0].index("value")
    assert lines[2][column : column + 6] == "0.1235" and lines[3][column:].lstrip().startswith("skipped")
    assert len({line.index(word) for line, word in zip(lines[2:], ("ok", "skipped"), strict=True)}) == 1


@pytest.mark.parametrize(
    ("sections", "status"),
    [
        ({"good": good}, 0),
        ({"missing": missing, "good": good}, 0),
        ({"bad": breaks_half_way, "good": good}, 1),
        ({"missing": missing}, 2),
    ],
)
def test_exit_status_and_json(sections, status, tmp_path, capsys):
    output = tmp_path / "folder" / "out.json"
    assert gpu_check.main(["--output", str(output)], lambda options: sections) == status
    document = json.loads(output.read_text())
    assert document["schema"] == 1 and document["machine"]["date"].startswith("20")
    assert {row["section"] for row in document["rows"]} == set(sections)
    out = capsys.readouterr().out
    assert str(output) in out and "verdict" in out


def test_one_section_alone(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "out.json"), "--only"]
    assert gpu_check.main([*arguments, "good"], lambda options: {"bad": breaks_half_way, "good": good}) == 0
    with pytest.raises(SystemExit):
        gpu_check.main([*arguments, "other"], lambda options: {"good": good})
    assert "there are good" in capsys.readouterr().err


def test_the_real_sections_say_why_they_did_not_run_here(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device: the sections would run")
    output = tmp_path / "out.json"
    assert gpu_check.main(["--output", str(output)]) == 2
    rows = json.loads(output.read_text())["rows"]
    assert [row["section"] for row in rows] == ["kernels", "golden", "model", "rtx"]
    assert all(row["verdict"] == "skipped" and row["note"] for row in rows)


def test_architecture_of_a_card():
    assert architecture((9, 0), [80, 90, 100]) == 90
    assert architecture((8, 9), [80, 90]) == 80
    with pytest.raises(Unavailable, match=r"8\.0, this card has 7\.5"):
        architecture((7, 5), [80, 90])


def test_machine_is_described_without_a_device():
    facts = describe()
    assert facts["date"] and facts["python"] and "torch" in facts
