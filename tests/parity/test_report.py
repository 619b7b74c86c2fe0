"""The report: what it says of a failure, what it shows, and that it stands alone."""

import base64
import hashlib
import html
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import pytest

from engines.build import build_engine
from engines.parity import ParityReport, verify
from engines.parity.gate import Check
from engines.parity.invariants import Invariant
from engines.parity.patterns import clues, grouped, strays
from engines.parity.report import SequenceResult
from engines.parity.steps import STEPS
from engines.parity.svg import MOST_POINTS
from engines.runtime.errors import EngineFileError
from export.taps import tap_names
from tests.conftest import GOLDEN, ROOT
from tests.parity.broken import break_engine

SCHEMA = json.loads((ROOT / "engines" / "parity" / "parity.schema.json").read_text(encoding="utf-8"))


def made(*, layers=3, length=40, sequences=4, failing=(), strange=(), taps=True, wrong=1e3, finite=True):
    """A report as the gate makes them. `failing`: starts of names of checks that fail. `strange`: (sequence, position) beyond the limit."""

    def check(name, tap="", sample=10):
        off = any(name.startswith(start) for start in failing)
        return Check(name, wrong * 4e-3 if off else 1e-3, 1e-3, 4e-3, "rad", sample, tap)

    names = [
        f"{phase}: {what}, {which}"
        for phase in ("prefill", "decode")
        for what in ("logit error", "sqrt(KL)")
        for which in ("mean", "worst position")
    ]
    checks = [
        Check("every output is finite", 0.0 if finite else 1.0, 0.0, 0.0, "", 4),
        *map(check, names),
        check("first choice differs where the margin is stable", sample=0),
    ]
    if taps:
        checks += [check(f"angle at {tap}, {which}", tap) for tap in tap_names(layers) for which in ("mean", "worst position")]
    curves = []
    for number in range(sequences):
        kl = [1e-7 * (1 + position % 3) for position in range(length)]
        for index, position in strange:
            if index == number:
                kl[position] = 1.0
        noise, margin = [1e-7] * length, [float(position % 4) for position in range(length)]
        angles = dict.fromkeys(tap_names(layers), 1e-3 * (number + 1)) if taps else {}
        curves.append(
            SequenceResult(
                f"random {number}", length // 2, kl, noise, kl, noise, margin, 1.5, [3, 5], angles, angles, list(range(length))
            )
        )
    invariants = [
        Invariant(
            "attn.q", "norm of rows", list(range(layers)), [0.999] * layers, [1.0] * layers, [1.001] * layers, [0, 2, 0][:layers]
        ),
        Invariant("sqk", "scale", list(range(layers)), [-0.5] * layers, [1.0] * layers, [2.0] * layers, [0] * layers),
        Invariant("lm_head", "norm of rows", [], [0.999], [1.0], [1.001], [0]),
    ]
    bad = any(c.failed for c in checks)
    summary = {
        "verdict": "fail" if bad else "pass",
        "engine": "model, cpu-fp32",
        "positions": length * sequences,
        "kl_mean": 1e-7,
    }
    return ParityReport(
        summary["verdict"], summary, checks, curves, {"files": {"model.onnx": "0" * 64}, "checkpoint": {}}, invariants
    )


def text_of(page):
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)))


def told(report):
    return " ".join(clues(report))


# What a failure says


def test_every_failure_is_listed_in_its_group():
    report = made(failing=("prefill", "decode", "angle"))
    failed = [check for checks in grouped(report.failures).values() for check in checks]
    assert {check.name for check in failed} == {check.name for check in report.failures} and len(failed) == 64
    assert list(grouped(report.failures)) == ["prefill", "decode", "taps"]
    page = text_of(report.to_html()).split("Where they part ways")[0]
    for check in report.failures:
        assert check.name in page
    assert "Logits of prefill: 4 of 4" in page and "Values inside the network: 56 of 56" in page


def test_the_first_value_that_parts_ways_is_named_with_what_it_is_and_what_to_look_at():
    report = made(failing=tuple(f"angle at {tap}," for tap in tap_names(3)[11:]))
    assert tap_names(3)[11] == "layers.1.attn.k_norm"
    assert "In layer 1, at layers.1.attn.k_norm" in told(report) and STEPS["attn.k_norm"].suspects in told(report)
    assert "What comes after it is off as well" in told(report)
    page = report.to_html()
    assert page.count('"over first"') == 1 and "first beyond: layers.1.attn.k_norm" in page
    row = next(row for row in re.findall(r"<tr>.*?</tr>", page, re.S) if '"over first"' in row)
    assert '<th scope="row">1</th>' in row


def test_an_error_that_fades_is_not_called_a_consequence():
    report = made(failing=("angle at layers.1.attn.v,",))
    assert "the error fades" in told(report) and "as it must be" not in told(report)


@pytest.mark.parametrize(
    ("failing", "options", "words"),
    [
        (("decode",), {}, "Only decode fails.*cache"),
        (("prefill",), {}, "Only prefill fails.*mask"),
        (("prefill", "decode"), {}, "is the head: .*sz"),
        (("prefill", "decode"), {"strange": [(2, 31)]}, "One sequence alone.*random 2, position 31 of 40"),
        (("prefill",), {"strange": [(1, 10)]}, "second piece of its prompt begins"),
        (("decode",), {"strange": [(2, 20)]}, "first step of decode"),
        (("prefill",), {"strange": [(2, 19)]}, "last token of its prompt, whose logits are asked for alone"),
        (("decode",), {"strange": [(0, 21), (0, 22), (0, 23), (2, 21), (2, 22), (2, 23)]}, "read in two pieces are followed"),
        (("prefill",), {"strange": [(1, 12), (1, 13), (1, 14), (3, 12), (3, 13), (3, 14)]}, "read in two pieces are followed"),
        (("decode",), {"strange": [(0, 22), (1, 3), (3, 31)]}, "Single positions.*random 0, position 22 of 40; random 1, position 3 of 40; random 3, position 31"),
        (("prefill", "decode"), {"wrong": 1.5}, "more than 1.5 times.*narrower type"),
        ((), {"finite": False, "strange": []}, "NaN or infinity"),
    ],
)  # fmt: skip
def test_a_pattern_is_put_into_words(failing, options, words):
    assert re.search(words, told(made(failing=failing, **options)), re.S), told(made(failing=failing, **options))


def test_a_sequence_with_nan_is_a_stray_and_drawn_as_a_cross():
    report = made(failing=("decode",), finite=False)
    report.sequences[1].kl[25:27] = [math.nan, math.inf]
    assert [(stray.index, stray.positions) for stray in strays(report)] == [(1, [25, 26])]
    assert "first at position 25 of random 1" in told(report)
    assert report.to_html().count('class="lost"') == 2


def test_nothing_of_a_pass_is_said_to_be_wrong():
    page = text_of(made().to_html())
    assert "PASS" in page and "What to do next" not in page and "What failed" not in page and "FAIL" not in page
    assert "ngpt-deploy package" in page


def test_what_was_not_decided_is_shown_as_such():
    page = made().to_html()
    section = page.split("<h2>Not applicable</h2>")[1].split("<h2>")[0]
    assert "first choice differs where the margin is stable" in section
    assert 'class="outcome not applicable">not applicable' in page


def test_an_engine_that_shows_nothing_inside_is_said_to():
    page = text_of(made(taps=False, failing=("prefill", "decode")).to_html())
    assert "shows no values inside" in page and "Layer by layer" not in page


def test_checks_of_a_served_model_have_groups_of_their_own():
    from engines.parity.wire_checks import CHOICE, SEEDS

    names = [
        CHOICE,
        SEEDS,
        "log-probability of the chosen token, mean",
        "every output is finite",
        "the noise, PyTorch in this precision, is finite",
    ]
    found = grouped([Check(name, 1.0, 0.0, 0.0, "", 1) for name in names])
    assert {group: len(checks) for group, checks in found.items()} == {"finite": 2, "choice": 1, "answers": 2}
    names = [
        "weights in the engine's file, rms",
        "quantised matrices that the engine's file lacks",
        "some weights are quantised",
        "quantised weights, rms",
    ]
    assert list(grouped([Check(name, 1.0, 0.0, 0.0, "", 1) for name in names])) == ["weights"]
    assert list(grouped([Check("values inside the engine", 0.0, 0.0, 0.0, "", 0)])) == ["taps"]
    page = text_of(
        ParityReport(
            "pass", {"verdict": "pass", "server": {"url": "127.0.0.1:1"}}, [Check(CHOICE, 0.0, 0.0, 0.0, "", 1)]
        ).to_html()
    )
    assert "running server" in page and "ngpt-deploy package" not in page


def test_a_report_without_any_sample_is_no_pass():
    page = text_of(ParityReport("fail", {"verdict": "fail", "engine": "e"}, [Check("x", 0.0, 0.0, 0.0, "", 0)]).to_html())
    assert "Nothing was decided" in page


# The page


def test_no_page_shows_how_python_writes_its_values():
    report = made(failing=("angle",))
    report.summary.update(
        not_applicable=["a", "b"],
        empty=[],
        gate={"mean": 4.0},
        nothing=None,
        yes=True,
        listed=["c", {"d": 1.5}],
        nested={"e": {"f": [1]}},
    )
    text = text_of(report.to_html().replace(re.search(r"<pre.*?</pre>", report.to_html(), re.S)[0], ""))
    for sign in ("[", "]", "{", "}", "None", "True", "False", "np.", "<"):
        assert sign not in text, (sign, text[max(0, text.find(sign) - 60) : text.find(sign) + 60])


def test_the_page_stands_alone_and_says_so_to_the_browser():
    page = made(failing=("decode",)).to_html()
    assert "<script" not in page and "src=" not in page and not re.search(r"\sstyle=|\son\w+=|@import|url\((?!#)", page)
    assert re.findall(r'(?:href|xlink:href)="(.*?)"', page) == ["#layers"]
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', page)[1])
    style = re.search(r"<style>(.*?)</style>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"style-src 'sha256-{digest}'" in policy


def test_pictures_are_described_and_tables_have_heads():
    page = made(failing=("angle",)).to_html()
    pictures = [part.split("</svg>")[0] for part in page.split("<svg")[1:]]
    ids = re.findall(r'id="(.*?)"', page)
    assert len(ids) == len(set(ids))
    for picture in pictures:
        root = ElementTree.fromstring("<svg" + picture + "</svg>")
        if root.get("aria-hidden"):
            continue
        named = root.get("aria-labelledby").split()
        about = {child.get("id"): child.text for child in root}
        assert root.get("role") == "img" and all(len(about[name]) > 2 for name in named)
    for table in page.split("<table")[1:]:
        assert 'scope="row"' in table and not re.search(r"<th(?![^>]*scope=)[ >]", table.split("</table>")[0])
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_curves_differ_by_more_than_their_colour():
    page = made(failing=("decode",)).to_html()
    kinds = {kind: re.search(rf'<polyline[^>]*class="{kind} line"[^>]*>', page)[0] for kind in ("engine", "noise", "limit")}
    assert "stroke-dasharray" in kinds["limit"] and "stroke-dasharray" not in kinds["engine"]
    assert 'class="noise area"' in page and 'class="engine area"' not in page
    assert float(re.search(r'stroke-width="([\d.]+)"', kinds["engine"])[1]) > float(
        re.search(r'stroke-width="([\d.]+)"', kinds["noise"])[1]
    )
    for svg in page.split("<svg")[1:]:
        drawn = svg.split("</svg>")[0].split("</desc>")[-1].split('<path d="M74')[0]  # what comes after is the legend
        if 'class="noise area"' in drawn and 'class="engine line"' in drawn:
            assert drawn.index("noise area") < drawn.index("engine line"), "the engine is drawn over the noise"


def test_a_large_report_stays_readable_and_small():
    report = made(layers=64, length=700, sequences=60, failing=("prefill", "decode", "angle"))
    page = report.to_html()
    assert len(page.encode()) < 2_000_000
    assert page.count("KL at each position") == 2 * 12 and "60 sequences were run" in page
    for points in re.findall(r'points="(.*?)"', page):
        assert len(points.split()) <= 2 * MOST_POINTS
    assert all(check.name in page for check in report.failures)


def test_names_from_outside_are_escaped_everywhere():
    bad = "</pre></style><script>alert('x')</script>"
    check = Check(bad, 2.0, 1.0, 1.0, bad, 1)
    tapped = Check(f"angle at layers.0.{bad}, mean", 2.0, 1.0, 1.0, bad, 1, f"layers.0.{bad}\n'''")
    sequence = SequenceResult(bad, 1, *([[1.0, 2.0]] * 5), 0.5, [1], {}, {}, [0, 1])
    invariants = [Invariant(bad, "scale", [0], [1.0], [1.0], [1.0], [1]), Invariant(bad, bad, [], [1.0], [1.0], [1.0], [1])]
    subject = {"files": {bad: bad}, "checkpoint": {bad: bad}}
    page = ParityReport("fail", {"engine": bad, bad: {bad: bad}}, [check, tapped], [sequence], subject, invariants).to_html()
    assert "<script" not in page and page.count("</style>") == 1 and page.count("</pre>") == 1
    script = html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", page, re.S)[1])
    compile(script, "reproduce.py", "exec")
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")


# parity.json


def test_parity_json_is_what_its_schema_says(tmp_path):
    report = made(failing=("angle",), finite=False)
    report.sequences[0].kl[3] = math.nan
    path, _ = report.write(tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(data, SCHEMA)
    for change in (
        lambda d: d.pop("invariants"),
        lambda d: d["checks"][0].pop("outcome"),
        lambda d: d["sequences"][0].update(extra=1),
        lambda d: d["sequences"][0]["kl"].append("NaN"),
        lambda d: d.update(verdict="maybe"),
    ):
        other = json.loads(path.read_text(encoding="utf-8"))
        change(other)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(other, SCHEMA)


def test_a_report_comes_back_from_its_json_and_one_that_was_damaged_does_not():
    stored = made(failing=("angle",)).to_dict()
    assert ParityReport.from_dict(stored).to_dict() == stored
    for change in (
        lambda d: d["sequences"][0]["margin"].pop(),
        lambda d: d["sequences"][0].update(prompt_length=10**9),
        lambda d: d["sequences"][0].update(other_choice=[-1]),
        lambda d: d["invariants"][0]["low"].pop(),
        lambda d: d["invariants"][0].update(layers=[1]),
        lambda d: d["invariants"][0].update(low=[[]]),
        lambda d: d.update(verdict="pass"),
        lambda d: d.update(sequences=5),
    ):
        damaged = json.loads(json.dumps(stored))
        change(damaged)
        with pytest.raises(EngineFileError, match="not a parity report"):
            ParityReport.from_dict(damaged)


# The script


def test_the_script_of_a_failed_report_runs_and_shows_the_fault(tmp_path):
    right = build_engine(GOLDEN / "gqa", "cpu-fp32", tmp_path / "right", verify=False)
    engine = break_engine(right, tmp_path / "engine", "layers.2.attn.qk_scale", 1.5)
    report = verify(engine, GOLDEN / "gqa", decode_steps=4)
    assert report.verdict == "fail" and report.summary["first_divergence"] == "layers.2.attn.q_scaled"
    report.write(tmp_path)
    page = (tmp_path / "parity.html").read_text(encoding="utf-8")
    script = html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", page, re.S)[1])
    assert len(script.splitlines()) <= 15
    (tmp_path / "reproduce.py").write_text(script, encoding="utf-8")
    words = [sys.executable, tmp_path / "reproduce.py", tmp_path / "parity.json", engine, GOLDEN / "gqa"]
    run = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    before, at = ([float(number) for number in re.findall(r"([\d.e+-]+) rad", line)] for line in run.stdout.splitlines())
    assert "layers.1.mlp.update" in run.stdout and "layers.2.attn.q_scaled" in run.stdout
    assert at[0] > 8 * at[1] and before[0] < 8 * before[1]


def test_the_schema_is_packed_with_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    root = ROOT / "engines"
    packed = {path for pattern in data["engines"] for path in root.glob(pattern)}
    assert {path for path in Path(root / "parity").rglob("*") if path.suffix in (".json", ".j2")} <= packed
