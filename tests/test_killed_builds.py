"""scripts/killed_builds.py in its short form: what a killed build leaves is whole, or is swept; and that the script would see it."""

import shutil
import signal
import subprocess
import sys

import pytest

from engines.build import build_engine
from engines.store import Store
from scripts import killed_builds
from tests.conftest import GOLDEN, ROOT

WAYS = ("ONNX, --store --resume", "TensorRT-LLM, --resume")


def test_builds_killed_at_random_leave_nothing_half():
    words = ["--kills", "12", "--forks", "--checkpoint", str(GOLDEN / "gqa"), "--ways", *WAYS]
    run = subprocess.run(
        [sys.executable, "scripts/killed_builds.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    last = [cell.strip() for cell in run.stdout.strip().splitlines()[-1].split("|")]
    assert last[1] == "all" and int(last[2]) + int(last[3]) == 12 and last[-2] == "0"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return build_engine(GOLDEN / "gqa", "cpu-fp32", tmp_path_factory.mktemp("whole") / "engine", verify=False)


@pytest.mark.parametrize(
    "what", ["a file is missing", "a file is short", "the manifest is missing", "an empty folder", "nothing of it"]
)
def test_half_an_engine_would_be_seen(what, engine, tmp_path):
    whole, found = killed_builds.contents(engine), killed_builds.Found()
    copy = shutil.copytree(engine, tmp_path / "engine")
    if what == "a file is missing":
        (copy / "config.json").unlink()
    elif what == "a file is short":
        (copy / "model.onnx").write_bytes(whole["model.onnx"][:-1])
    elif what == "the manifest is missing":
        (copy / "manifest.json").write_text("{}")
    elif what == "an empty folder":
        shutil.rmtree(copy)
        copy.mkdir()
    state = killed_builds.left(tmp_path, whole, found, signal.SIGKILL)
    if what == "nothing of it":
        assert (state, found.wrong) == ("engine without verdict", [])
    else:
        assert state == "HALF AN ENGINE" and len(found.wrong) == 1


def test_half_an_entry_of_a_store_and_what_sigterm_left_would_be_seen(engine, tmp_path):
    whole, found = killed_builds.contents(engine), killed_builds.Found()
    key = "0" * 64
    (tmp_path / "store" / key / "engine").mkdir(parents=True)
    (tmp_path / ".engine.1.ngpt-partial").mkdir()
    assert killed_builds.left(tmp_path, whole, found, signal.SIGTERM) == "HALF AN ENGINE"
    assert [text.split()[0] for text in found.wrong] == ["half", "half", "SIGTERM"] and Store(tmp_path / "store").all_keys() == [
        key
    ]
