"""`ngpt-deploy serve` and `generate` as two processes, as a user runs them."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from scripts.cli import main
from tests.conftest import ROOT, TINY
from tests.triton_repo.test_package import config_of
from triton_repo.package import package_engine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_serve_answers_generate_and_stops_on_sigterm(tiny_engine_folder, tmp_path):
    package_engine(tiny_engine_folder, tmp_path / "models")
    ports = [free_port() for _ in range(3)]
    names = ("--http-port", "--grpc-port", "--metrics-port")
    options = [word for pair in zip(names, ports, strict=True) for word in pair]
    command = [sys.executable, "-m", "scripts.cli"]
    server = subprocess.Popen(
        [*command, "serve", str(tmp_path / "models"), *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert f"gRPC 127.0.0.1:{ports[1]}" in server.stdout.readline()
        url = f"127.0.0.1:{ports[1]}"
        run = subprocess.run(
            [*command, "generate", "import os", "--url", url, "--max-tokens", "12"], cwd=ROOT, capture_output=True, text=True
        )
        local = subprocess.run(
            [*command, "generate", "import os", "--engine", str(tiny_engine_folder), "--max-tokens", "12"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0 and run.stdout == local.stdout and len(run.stdout) > 5
        refused = subprocess.run(
            [*command, "generate", "x", "--url", url, "--max-tokens", "0"], cwd=ROOT, capture_output=True, text=True
        )
        assert refused.returncode == 2 and "max_tokens" in refused.stderr and "Traceback" not in refused.stderr
        wrong = subprocess.run(
            [*command, "generate", "x", "--url", f"127.0.0.1:{ports[0]}"], cwd=ROOT, capture_output=True, text=True
        )
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "not the HTTP one" in wrong.stderr
        taken = subprocess.run([*command, "serve", str(tmp_path / "models"), *options], cwd=ROOT, capture_output=True, text=True)
        assert taken.returncode == 2 and taken.stderr.count("\n") == 1 and f"port {ports[0]} cannot be had" in taken.stderr
        server.send_signal(signal.SIGTERM)  # handled as Ctrl-C is
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.stdout.close()
        server.wait()


@pytest.mark.parametrize("given", [{"prefill_chunk": "7", "max_queue": "3"}, {}])
def test_package_writes_what_it_is_asked_for_into_the_models_parameters(tiny_engine_folder, tmp_path, given):
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert main(["package", str(tiny_engine_folder), "--output", str(tmp_path / "models"), "--allow-unverified", *words]) == 0
    found = {name: value.string_value for name, value in config_of(tmp_path / "models", "ensemble").parameters.items()}
    for name in ("prefill_chunk", "max_queue"):
        assert found[name] == given.get(name, "256")


@pytest.mark.parametrize("option", ["--prefill-chunk", "--max-queue", "--threads"])
def test_package_refuses_an_option_of_engines_for_a_checkpoint(tmp_path, capsys, option):
    assert main(["package", str(TINY), "--output", str(tmp_path / "models"), "--allow-unverified", option, "3"]) == 2
    assert f"{option} is an option of an engine" in capsys.readouterr().err and not (tmp_path / "models").exists()


def test_a_server_that_is_starting_stops_on_sigterm(tiny_engine_folder, tmp_path):
    package_engine(tiny_engine_folder, tmp_path / "models")
    ports = [word for name in ("--http-port", "--grpc-port", "--metrics-port") for word in (name, "0")]
    log = tmp_path / "log.txt"
    words = ["-m", "scripts.cli", "serve", str(tmp_path / "models"), "--log", str(log), *ports]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    server = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=60)
    assert (server.returncode, out, err) == (143, "", "ngpt-deploy serve: stopped by SIGTERM\n") and list(scratch.iterdir()) == []
