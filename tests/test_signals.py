"""Signals that ask a command to stop: it cleans up, says so in one line, and what a killed one left is swept."""

import os
import signal
import subprocess
import sys
import time

import pytest

from scripts.cli import main
from scripts.signals import Terminated, stopping
from tests.conftest import GOLDEN, ROOT

# Runs a command that stops for a minute where the function named first is called.
WAITING = """
import importlib, sys, time

module, name = sys.argv[1].split(":")
def wait(*args, **kwargs):
    print("there", flush=True)
    time.sleep(60)
setattr(importlib.import_module(module), name, wait)
from scripts.cli import main
sys.exit(main(sys.argv[2:]))
"""
WAITS = {
    "build": ("engines.backends.onnx:export_graph", ["--checkpoint", str(GOLDEN / "gqa"), "--output", "{}/out"]),
    "convert": ("ngpt.checkpoint.save:_write", ["--checkpoint", str(GOLDEN / "gqa"), "--output", "{}/out"]),
    "package": ("triton_repo.package:_copy_engine", ["{engine}", "--output", "{}/out"]),
    "generate": ("engines.runtime.engine:_pieces", ["x", "--engine", "{engine}"]),
}


def waiting(name, engine, folder):
    place, args = WAITS[name]
    words = [arg.replace("{}", str(folder)).replace("{engine}", str(engine)) for arg in args]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, place, name, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "there\n", process.stderr.read()
    return process


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [*((name, signal.SIGTERM, 143) for name in WAITS), ("package", signal.SIGHUP, 129), ("package", signal.SIGINT, 130)],
)
def test_a_signal_cleans_up(name, number, code, tiny_engine_folder, tmp_path):
    process = waiting(name, tiny_engine_folder, tmp_path)
    assert len(list(tmp_path.iterdir())) == (name != "generate")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and err == f"ngpt-deploy {name}: stopped by {signal.Signals(number).name}\n"
    assert list(tmp_path.iterdir()) == []


def test_ending_imports_nothing_for_an_import_may_be_what_was_stopped():
    code = "import sys, scripts.terminal as t; before = set(sys.modules); t.fail('x', KeyboardInterrupt()); t.fail('x', OSError(5, 'no'))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(set(sys.modules) - before)"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "set()\n" and done.stderr.count("\n") == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_request_that_comes_in_a_callback_of_python_is_not_lost(number, code, monkeypatch, capsys):
    class Interrupted:
        def __del__(self):
            signal.raise_signal(number)

    def work(_):
        Interrupted()
        time.sleep(10)

    monkeypatch.setattr("scripts.commands.planning._plan", work)
    start = time.monotonic()
    assert main(["plan"]) == code and time.monotonic() - start < 5
    assert capsys.readouterr().err == f"ngpt-deploy plan: stopped by {number.name}\n"


def test_a_second_request_does_not_interrupt_the_cleaning(tiny_engine_folder, tmp_path, monkeypatch):
    with stopping():
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        monkeypatch.setattr("scripts.signals.PATIENCE", 0.0)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_became_another_error_on_its_way_is_still_a_signal(capsys, monkeypatch):
    """A library that is halfway imported turns the exception into one of its own."""

    def load(_args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise AttributeError("module 'numpy' has no attribute 'dtype'") from None

    monkeypatch.setattr("scripts.commands.planning._plan", load)
    assert main(["plan"]) == 143
    assert capsys.readouterr().err == "ngpt-deploy plan: stopped by SIGTERM\n"


def test_what_a_kill_leaves_is_swept_by_the_next_command_whichever_it_is(tiny_engine_folder, tmp_path, capsys):
    killed = [waiting(name, tiny_engine_folder, tmp_path) for name in ("convert", "package")]
    for process in killed:
        process.kill()
        process.communicate()
    assert len(list(tmp_path.iterdir())) == 2
    alive = waiting("package", tiny_engine_folder, tmp_path)
    try:
        assert main(["convert", "--checkpoint", str(GOLDEN / "gqa"), "--output", str(tmp_path / "hf")]) == 0
        left = [path.name for path in tmp_path.iterdir() if path.name != "hf"]
        assert len(left) == 1 and left[0].endswith(".ngpt-partial")
    finally:
        alive.terminate()
        alive.communicate()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_signal_during_an_import_waits_for_its_end(tmp_path, monkeypatch, capsys):
    """Compiled parts of libraries turn what is raised while they load into other errors, or abort the process."""
    (tmp_path / "slow_to_load.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.2)\nloaded = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    seen = []

    def load(_args):
        import slow_to_load

        seen.append(slow_to_load.loaded)
        time.sleep(5)

    monkeypatch.setattr("scripts.commands.planning._plan", load)
    start = time.monotonic()
    assert main(["plan"]) == 143 and seen == [True] and time.monotonic() - start < 4
    assert capsys.readouterr().err == "ngpt-deploy plan: stopped by SIGTERM\n"
