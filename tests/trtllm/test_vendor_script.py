"""scripts/verify_on_vendor_container.sh and its parity step, as far as they run here: syntax, refusals, the steps."""

import subprocess
import sys

import numpy as np
import pytest

from export.trtllm.parallel import Parallel
from scripts import trtllm_parity
from tests.conftest import GOLDEN, ROOT
from tests.trtllm.serving import Engine, converted

SCRIPT = ROOT / "scripts" / "verify_on_vendor_container.sh"


def test_the_script_parses():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((), "CHECKPOINT OUTPUT"), (("missing", "out"), "no checkpoint"), ((GOLDEN / "gqa", "."), "exists"),
     ((GOLDEN / "gqa", "out"), "nvidia-smi|tensorrt_llm")],
)  # fmt: skip
def test_it_refuses_before_doing_anything(arguments, named, tmp_path):
    run = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and any(word in run.stderr for word in named.split("|"))
    assert not list(tmp_path.iterdir())


def steps(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["trtllm_parity.py", *map(str, words)])
    return trtllm_parity.main()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "reference.npz"
    with pytest.MonkeyPatch.context() as patch:
        assert steps(patch, "reference", "--checkpoint", GOLDEN / "gqa", "--precision", "bf16", "--output", path) == 0
    return path


def engine_run(reference, path, folder):
    """The file that the step `run` would write, from the double."""
    engine = Engine(converted(GOLDEN / "gqa", folder, Parallel(2), "bf16"), 2, slots=1)
    with np.load(reference) as data:
        found = {}
        for index in range(trtllm_parity.count(data)):
            engine.lengths = [0]
            found[f"logits.{index}"] = engine.step([(0, data[f"tokens.{index}"], True)])[0]
    np.savez(path, **found)
    return found


def test_parity_passes_the_network_and_fails_a_wrong_one(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.trtllm.serving.MAX_LEN", 256)
    run = tmp_path / "run.npz"
    found = engine_run(reference, run, tmp_path)
    assert steps(monkeypatch, "compare", "--reference", reference, "--run", run) == 0
    assert "parity   pass" in capsys.readouterr().out
    np.savez(run, **{name: np.roll(value, 1, axis=0) for name, value in found.items()})
    assert steps(monkeypatch, "compare", "--reference", reference, "--run", run) == 3
    np.savez(run, **{name: value[:-1] for name, value in found.items()})
    assert steps(monkeypatch, "compare", "--reference", reference, "--run", run) == 3
    assert "expected" in capsys.readouterr().out
