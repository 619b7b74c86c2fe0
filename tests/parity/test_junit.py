"""The verdict as JUnit XML, by the rules of the schema junit-10.xsd of Jenkins' xUnit plugin (its elements and attributes, written anew)."""

import math
from xml.etree import ElementTree

import pytest

from engines.parity.baseline import Move
from engines.parity.gate import Check
from engines.parity.junit import junit_of
from engines.parity.report import ParityReport
from tests.parity.test_report import made

# Element -> (attributes it must have, attributes it may have, elements it may hold, whether it holds text).
RULES = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}, False),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
        False,
    ),
    "testcase": ({"name"}, {"time", "classname", "group"}, {"skipped", "error", "failure", "system-out", "system-err"}, False),
    "failure": (set(), {"type", "message"}, set(), True),
    "skipped": (set(), {"type", "message"}, set(), True),
    "system-out": (set(), set(), set(), True),
}  # fmt: skip


def read(report, moves=()):
    root = ElementTree.fromstring(junit_of(report, moves))
    assert root.tag == "testsuites"
    for element in root.iter():
        needed, allowed, inside, text = RULES[element.tag]
        assert needed <= set(element.attrib) <= needed | allowed, element.attrib
        assert {child.tag for child in element} <= inside
        assert text or not (element.text or "").strip()
    for suite in root:
        cases = suite.findall("testcase")
        assert int(suite.get("tests")) == len(cases)
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("skipped")) == len(suite.findall("testcase/skipped"))
    for key in ("tests", "failures"):
        assert int(root.get(key)) == sum(int(suite.get(key)) for suite in root)
    return root


def test_every_check_is_a_test_case_and_its_outcome_is_the_checks():
    report = made(failing=("decode",))
    root = read(report)
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert list(cases) == [check.name for check in sorted(report.checks, key=lambda check: list(cases).index(check.name))]
    assert len(cases) == len(report.checks)
    for check in report.checks:
        case = cases[check.name]
        assert (case.find("failure") is not None) == check.failed and (case.find("skipped") is not None) == (not check.sample)
    failure = cases["decode: sqrt(KL), mean"].find("failure")
    for part in ("measured 4", "limit 0.004", "noise 0.001", "1000 times the limit"):
        assert part in failure.get("message") + failure.text
    assert "Only decode fails" in root.find("testsuite[@name='parity: Logits of decode']/system-out").text


def test_a_figure_that_got_worse_fails_and_one_that_was_not_measured_is_skipped():
    moves = [
        Move("size", 10.0, 20.0, 0.0, "worse"),
        Move("speed", 10.0, None, 0.1, "not measured"),
        Move("kl", 1.0, 1.0, 0.1, "same"),
        Move("lost", 1.0, None, 0.1, "gone"),
    ]
    suite = read(made(), moves).find("testsuite[@name='baseline']")
    assert [(case.get("name"), [child.tag for child in case]) for case in suite] == [
        ("size", ["failure"]), ("speed", ["skipped"]), ("kl", []), ("lost", ["failure"]),
    ]  # fmt: skip
    assert "+100.0%" in suite[0].find("failure").get("message")


@pytest.mark.parametrize(
    "bad", ["</testcase><x>", "\x00\x0b\x1b[31m", "\ud800", "\ufffe\uffff", "\"&<>'", "]]>", "\u202e", "x" * 10**5, "\r\n\t"]
)
def test_no_name_can_break_the_file(bad):
    check = Check(f"prefill: {bad}", math.nan, math.inf, 1.0, bad, 1)
    root = read(ParityReport("fail", {"verdict": "fail", "engine": bad}, [check]), [Move(bad, 1.0, 3.0, 0.0, "worse")])
    assert len(root.findall("testsuite/testcase/failure")) == 2
    assert all(len(value) < 1200 for element in root.iter() for value in element.attrib.values())
