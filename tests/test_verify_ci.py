"""`verify` for continuous integration: its files, its exit codes, and this repository's own regression file."""

import json
import shutil
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from engines.build import build_engine
from engines.parity import ParityReport, prompts
from engines.parity import verify as compare_with_pytorch
from engines.parity.baseline import compare, figures_of, read_baseline, table
from engines.runtime.manifest import read_manifest
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import ConfigError
from scripts.cli import main
from tests.conftest import GOLDEN, ROOT, TINY
from tests.parity.broken import break_engine

BASELINE = ROOT / "examples" / "ci" / "ngpt-tiny.baseline.json"
GQA = GOLDEN / "gqa"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return build_engine(GQA, "cpu-fp32", tmp_path_factory.mktemp("engine") / "gqa", verify=False)


@pytest.fixture
def copy(engine, tmp_path):
    return shutil.copytree(engine, tmp_path / "engine")


def verify(engine, *options, checkpoint=GQA):
    return main(["verify", str(engine), "--checkpoint", str(checkpoint), *map(str, options)])


@pytest.fixture
def baseline(copy, tmp_path, capsys):
    path = tmp_path / "baseline.json"
    assert verify(copy, "--baseline", path, "--update-baseline", "--runs", 3) == 0
    assert "cpu-fp32 recorded, over 3 run(s)" in capsys.readouterr().out
    return path


# This repository's own regression file


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8", "cpu-int4", "onnx-portable"])
def test_the_example_is_as_good_and_as_small_as_it_was(target, tiny_engine_folder, tmp_path):
    """Where this fails and the change is meant: `make baseline` records it anew."""
    if target == "cpu-int8":
        folder = tiny_engine_folder
        report = ParityReport.from_dict(json.loads((folder / "parity.json").read_text(encoding="utf-8")))
    else:
        folder = build_engine(TINY, target, tmp_path / "engine", verify=False)
        report = compare_with_pytorch(folder, TINY)
    manifest = read_manifest(folder)
    entry = read_baseline(BASELINE, manifest)
    moves = compare(entry, figures_of(report, manifest))
    assert report.verdict == "pass" and not [move for move in moves if move.worse], table(moves)
    assert {move.outcome for move in moves} <= {"same", "better"} and len(moves) > 15


def test_the_regression_file_has_every_target_that_runs_here_and_nothing_of_this_machine():
    data = json.loads(BASELINE.read_text(encoding="utf-8"))
    assert sorted(data["targets"]) == ["cpu-fp32", "cpu-int4", "cpu-int8", "onnx-portable"]
    assert not [name for entry in data["targets"].values() for name in entry["figures"] if "speed" in name]


# Exit codes


def test_what_did_not_change_is_fine_and_the_table_says_so(copy, baseline, tmp_path, capsys):
    assert verify(copy, "--baseline", baseline, "--junit", tmp_path / "out" / "junit.xml") == 0
    out = capsys.readouterr().out
    assert "size of the engine, bytes" in out and "worse" not in out and out.splitlines()[-1].startswith("parity   pass")
    root = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()
    assert root.get("failures") == "0" and root.find("testsuite[@name='baseline']") is not None


def test_an_engine_that_got_worse_within_its_limits_ends_with_four(copy, baseline, tmp_path, capsys):
    worse = break_engine(copy, tmp_path / "worse", "layers.1.attn.qk_scale", 1 + 1e-6)
    assert verify(worse, "--baseline", baseline, "--junit", tmp_path / "junit.xml", "--json") == 4
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["verdict"] == "pass", found["failed_checks"]
    assert "worse" in {move["outcome"] for move in found["baseline"]}
    assert err.count("\n") == 1 and "is worse than" in err and "times the noise" in err and "--update-baseline" in err
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert root.find("testsuite[@name='baseline']/testcase/failure").get("type") == "regression"


def test_an_engine_that_is_wrong_ends_with_three_and_its_files_are_written(copy, baseline, tmp_path, capsys):
    wrong = break_engine(copy, tmp_path / "wrong", "layers.1.attn.qk_scale", 1.5)
    assert verify(wrong, "--baseline", baseline, "--junit", tmp_path / "junit.xml", "--report", tmp_path / "report") == 3
    assert int(ElementTree.parse(tmp_path / "junit.xml").getroot().get("failures")) > 10
    assert json.loads((tmp_path / "report" / "parity.json").read_text())["verdict"] == "fail"
    before = baseline.read_bytes()
    assert verify(wrong, "--baseline", baseline, "--update-baseline") == 3
    assert baseline.read_bytes() == before, "a wrong engine is no standard"
    assert "cpu-fp32 recorded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--update-baseline"], "--update-baseline without a file"),
        (["--speed"], "--speed without a file"),
        (["--baseline", "nowhere.json"], "nowhere.json"),
        (["--baseline", str(BASELINE)], "another checkpoint"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_run(options, words, engine, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["engines.parity.verify"], "run_engine", lambda *_: pytest.fail("the engine was run"))
    assert verify(engine, *options) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_another_number_of_steps_is_not_compared(copy, baseline, capsys):
    assert verify(copy, "--baseline", baseline, "--decode-steps", 3) == 2
    assert "other tokens" in capsys.readouterr().err
    assert read_manifest(copy).parity["verdict"] == "pass", "the verdict is recorded all the same"


def test_speed_is_measured_against_pytorch_and_compared(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engines.parity.speed.ROUNDS", 2)
    path = tmp_path / "speed.json"
    assert verify(copy, "--baseline", path, "--update-baseline", "--speed", "--runs", 1, "--decode-steps", 2) == 0
    figures = json.loads(path.read_text())["targets"]["cpu-fp32"]["figures"]
    assert all(figures[f"speed against PyTorch: {what}"]["value"] > 0 for what in ("prefill", "decode"))
    for name in figures:
        if name.startswith("speed"):
            figures[name] = {"value": 1e6, "noise": 0.01}
    data = json.loads(path.read_text())
    data["targets"]["cpu-fp32"]["figures"] = figures
    path.write_text(json.dumps(data))
    capsys.readouterr()
    assert verify(copy, "--baseline", path, "--speed", "--decode-steps", 2) == 4
    assert "speed against PyTorch: decode" in capsys.readouterr().err
    assert verify(copy, "--baseline", path, "--decode-steps", 2) == 0, "not timed, not judged"


# Text


def test_the_perplexity_of_a_file_is_that_of_both(tiny_engine_folder, tmp_path, capsys):
    text = (ROOT / "engines" / "parity" / "gate.py").read_text(encoding="utf-8")[:1000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    engine = shutil.copytree(tiny_engine_folder, tmp_path / "engine")
    assert verify(engine, "--text", tmp_path / "text.txt", "--decode-steps", 1, "--json", checkpoint=TINY) == 0
    found = json.loads(capsys.readouterr().out)["perplexity"]
    from engines import load_engine

    with load_engine(engine) as loaded:
        ids = loaded.tokenizer.encode(text)[:512]
        logits = loaded.logits([ids])[0].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    assert found["windows"] == 1 and found["tokens"] == len(ids) - 1
    assert found["engine"] == pytest.approx(np.exp(-log_p[np.arange(len(ids) - 1), ids[1:]].mean()), rel=1e-5)
    assert found["reference"] != pytest.approx(found["engine"], rel=1e-4) and abs(found["engine"] / found["reference"] - 1) < 0.02


def test_windows_cover_the_text_once_and_are_bounded(monkeypatch):
    with open_checkpoint(TINY) as checkpoint:
        text = "def main():\n    return 1\n" * 400
        ids = checkpoint.text.tokenizer().encode(text).ids
        windows = prompts.text_windows(checkpoint, text, max_length=200, decode_steps=None)
        assert [token for window in windows for token in window.tokens] == ids[: sum(len(window.tokens) for window in windows)]
        assert sum(len(window.tokens) for window in windows) >= min(len(ids), prompts.MOST_TEXT_TOKENS) - 1
        assert {len(window.tokens) for window in windows[:-1]} == {200} and all(
            window.from_file and window.is_text for window in windows
        )
        assert all(len(window.tokens) - window.prompt_length == prompts.TEXT_STEPS for window in windows[:-1])
        monkeypatch.setattr(prompts, "_MOST_LOGITS", 450 * checkpoint.spec.vocab_size)
        few = prompts.text_windows(checkpoint, text, max_length=200, decode_steps=2)
        assert [len(window.tokens) for window in few] == [200, 200, 50] and few[0].prompt_length == 198
        with pytest.raises(ConfigError, match="two tokens or more"):
            prompts.text_windows(checkpoint, "", max_length=200, decode_steps=None)


@pytest.mark.parametrize(("raw", "words"), [(b"", "blanks"), (b" \n", "blanks"), (b"abc\xff def", "UTF-8.*another byte at 3")])
def test_a_file_that_is_no_text_is_refused(raw, words, tmp_path):
    (tmp_path / "text").write_bytes(raw)
    with pytest.raises(ConfigError, match=words):
        prompts.read_text(tmp_path / "text")


def test_of_a_large_file_the_beginning_is_read_whole_letters_only(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("é" * 100, encoding="utf-8")
    monkeypatch.setattr(prompts, "MOST_TEXT_BYTES", 11)
    assert prompts.read_text(tmp_path / "text") == "é" * 5
    for bad in (tmp_path, tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            prompts.read_text(bad)
