"""The verdict as JUnit XML, which GitHub's actions, GitLab and Jenkins show: a suite a group of checks, a test case a check."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from engines.parity.baseline import Move
from engines.parity.gate import Check
from engines.parity.patterns import GROUPS, clues, grouped
from engines.parity.report import ParityReport
from engines.parity.words import excess, number
from ngpt.errors import plain

_MOST_TEXT = 500


def junit_of(report: ParityReport, moves: Sequence[Move] = ()) -> bytes:
    """UTF-8 XML after the schema junit-10.xsd. A check that fails is a failure with what was measured, one without a sample is
    skipped; a figure that got worse than the baseline is a failure of the suite "baseline". No character of a name from outside
    can end up as markup, nor as one that XML does not have."""
    root = ElementTree.Element("testsuites", name=_text(f"parity of {report.summary.get('engine', 'an engine')}"))
    for group, checks in grouped(report.checks).items():
        suite = _suite(root, f"parity: {GROUPS[group]}", checks)
        if group == next(iter(grouped(report.failures)), None):
            ElementTree.SubElement(suite, "system-out").text = _text("\n".join(clues(report)), 4000)
    if moves:
        cases = [_moved(move) for move in moves]
        _filled(root, "baseline", cases)
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    ElementTree.indent(root)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return xml + b"\n"


def _suite(root: ElementTree.Element, name: str, checks: Sequence[Check]) -> ElementTree.Element:
    cases = []
    for check in checks:
        case = ElementTree.Element("testcase", classname=name, name=_text(check.name))
        if check.failed:
            times = excess(check)
            message = f"measured {number(check.measured)} {check.unit}, limit {number(check.limit)}, noise {number(check.noise)}"
            detail = (
                f"{message}; {times + ' times the limit' if times else 'not within any limit'}, on a sample of {check.sample}"
            )
            ElementTree.SubElement(case, "failure", type="parity", message=_text(message)).text = _text(detail)
        elif not check.sample:
            ElementTree.SubElement(case, "skipped", message="not applicable: nothing to decide it on")
        cases.append(case)
    return _filled(root, name, cases)


def _moved(move: Move) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname="baseline", name=_text(move.name))
    if move.worse:
        ElementTree.SubElement(case, "failure", type="regression", message=_text(move.in_words())).text = _text(move.in_words())
    elif move.outcome == "not measured":
        ElementTree.SubElement(case, "skipped", message="not measured this time")
    return case


def _filled(root: ElementTree.Element, name: str, cases: Sequence[ElementTree.Element]) -> ElementTree.Element:
    suite = ElementTree.SubElement(root, "testsuite", name=_text(name), tests=str(len(cases)), errors="0")
    suite.set("failures", str(sum(case.find("failure") is not None for case in cases)))
    suite.set("skipped", str(sum(case.find("skipped") is not None for case in cases)))
    suite.extend(cases)
    return suite


def _text(text: str, most: int = _MOST_TEXT) -> str:
    """What XML 1.0 can hold: control characters, lone surrogates and what is no character are spelled out."""
    return plain(text, most)
