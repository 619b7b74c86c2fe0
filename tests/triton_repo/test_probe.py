"""The health check of deploy/: against the real server, and against servers that hang, are full, or are gone."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest

from deploy.probe import FULL
from tests.conftest import ROOT

FULL_STATUS = 400  # what server 2.51 makes of UNAVAILABLE


def probe(http, metrics="127.0.0.1:9", timeout=5, model="ensemble", arguments=(), **environment):
    command = [sys.executable, ROOT / "deploy" / "probe.py", "--http", http, "--metrics", metrics, "--timeout", str(timeout)]
    command += [*arguments, *(["--model", model] if model else [])]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def test_a_working_server_passes(served):
    before = served.metrics()["ngpt_generated_tokens"]
    run = probe(served.server.http_url, served.server.metrics_url, timeout=20)
    assert run.returncode == 0, run.stderr
    served.wait_for(lambda now: now["ngpt_generated_tokens"] > before)


@pytest.mark.parametrize("model", ["tensorrt_llm", "ensemble,tensorrt_llm"])
def test_the_tokens_model_is_asked_too(served, model):
    time.sleep(0.3)  # what other tests have done is published by then
    before = served.metrics()["ngpt_requests_completed"]
    run = probe(served.server.http_url, served.server.metrics_url, timeout=20, model=model)
    assert run.returncode == 0, run.stderr
    served.wait_for(lambda now: now["ngpt_requests_completed"] == before + len(model.split(",")))


def test_a_model_that_makes_no_tokens_is_no_health_check(served):
    run = probe(served.server.http_url, served.server.metrics_url, model="preprocessing")
    assert run.returncode == 1 and "expected a model with the input text_input or input_ids" in run.stderr


def test_a_server_that_is_not_there_fails_with_the_reason():
    run = probe("127.0.0.1:9", timeout=1)
    assert run.returncode == 1 and "no connection to http://127.0.0.1:9/v2/models/ensemble" in run.stderr


def test_a_model_that_is_not_there_fails_with_the_servers_words(served):
    run = probe(served.server.http_url, served.server.metrics_url, model="tensorrt_llm_bls")
    assert run.returncode == 1 and "answered 404" in run.stderr and "tensorrt_llm_bls" in run.stderr


def test_a_full_queue_is_seen_as_busy(served):
    """Sixty requests are more than slots and queue hold: some are refused in words that the probe knows, while it passes."""

    def ask(_):
        body = {"text_input": "def ", "max_tokens": 100, "end_id": -1}
        request = urllib.request.Request(
            f"http://{served.server.http_url}/v2/models/ensemble/generate", json.dumps(body).encode()
        )
        try:
            with urllib.request.urlopen(request, timeout=60):
                return ""
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode()

    with ThreadPoolExecutor(61) as pool:
        health = pool.submit(probe, served.server.http_url, served.server.metrics_url, 20)
        refusals = [answer for answer in pool.map(ask, range(60)) if answer]
        assert health.result().returncode == 0
    assert refusals and all(any(words in answer for words in FULL) for answer in refusals)


class Fake(NamedTuple):
    address: str
    bodies: list  # of the requests


@contextlib.contextmanager
def fake(status, moving, inputs=("text_input", "max_tokens", "stream"), labels='model="ensemble"', answer=b"{}"):
    """A double of the server's HTTP and metrics endpoints: `status` 0 never answers; `moving` lets the counters grow."""
    end = threading.Event()
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if not status:
                end.wait(10)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"error": "the queue is full: expected"}' if status == FULL_STATUS else answer)

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            if "/v2/models/" in self.path:
                self.wfile.write(json.dumps({"inputs": [{"name": name} for name in inputs]}).encode())
                return
            tokens = time.monotonic_ns() if moving else 7
            self.wfile.write(f"# HELP\nngpt_generated_tokens{{{labels}}} {tokens}\n".encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Fake(f"127.0.0.1:{server.server_port}", bodies)
    finally:
        end.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "moving", "healthy"),
    [
        (0, False, False),
        (0, True, True),
        (FULL_STATUS, False, False),
        (FULL_STATUS, True, True),
        (500, True, False),
        (200, True, False),
    ],
    ids=["hangs", "busy", "full-and-stuck", "full", "broken", "answers-nonsense"],
)
def test_busy_is_healthy_and_stuck_is_not(status, moving, healthy):
    with fake(status, moving) as double:
        run = probe(double.address, double.address, timeout=0.5)
        assert (run.returncode == 0) == healthy, run.stderr
        assert bool(run.stderr) != healthy


@pytest.mark.parametrize(
    ("model", "inputs", "output", "body"),
    [
        (
            "tiny-1.b",
            ("text_input", "input_ids", "max_tokens", "stream"),
            "text_output",
            {"text_input": "a", "max_tokens": 1, "stream": False},
        ),
        (
            "tiny_tensorrt_llm",
            ("input_ids", "input_lengths", "request_output_len", "streaming"),
            "output_ids",
            {"input_ids": [0], "input_lengths": 1, "request_output_len": 1, "streaming": False},
        ),
        (
            "tensorrt_llm",  # of TensorRT-LLM's PyTorch runtime
            ("text_input", "sampling_param_max_tokens", "streaming"),
            "text_output",
            {"text_input": "a", "sampling_param_max_tokens": 1, "streaming": False},
        ),
    ],
)
def test_a_model_of_any_name_is_asked_for_what_it_takes(model, inputs, output, body):
    with fake(200, True, inputs, answer=json.dumps({output: 0}).encode()) as double:
        run = probe(double.address, double.address, model=None, NGPT_MODEL=model)
        assert run.returncode == 0, run.stderr
    assert double.bodies == [body]


def test_another_models_tokens_do_not_excuse_a_hung_one():
    with fake(0, True, labels='model="other"', inputs=("text_input",)) as double:
        assert probe(double.address, double.address, timeout=0.5).returncode == 0  # an alias: the tokens are its model's
    two = 'model="ensemble",version="1"} 7\nngpt_generated_tokens{model="other"'
    with fake(0, True, labels=two, inputs=("text_input",)) as double:
        assert probe(double.address, double.address, timeout=0.5).returncode == 1


def test_a_server_that_takes_no_connections_is_not_busy():
    """It has been told to stop, and answers what it has: its metrics may move still."""
    with fake(200, True) as double:
        began = time.monotonic()
        run = probe("127.0.0.1:9", double.address, timeout=20)
        assert run.returncode == 1 and "no connection" in run.stderr and time.monotonic() - began < 10


def test_docker_ends_a_server_that_has_worked_and_does_no_more(tmp_path):
    """A double called tritonserver; the real ones of other tests are hidden behind a /proc of our own making."""
    program = tmp_path / "tritonserver"
    shutil.copy(shutil.which("sleep"), program)
    text = (ROOT / "deploy" / "probe.py").read_text().replace('Path("/proc")', f'Path("{tmp_path}/proc")')
    copy = tmp_path / "probe.py"
    copy.write_text(text)
    with subprocess.Popen([program, "60"]) as server:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / str(server.pid)).symlink_to(f"/proc/{server.pid}")

        def run(address):
            command = [sys.executable, copy, "--http", address, "--metrics", address, "--kill-after", "2", "--timeout", "0.3"]
            return subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True).returncode

        try:
            good = json.dumps({"text_output": ""}).encode()
            with fake(200, False, answer=good) as works, fake(500, False) as broken:
                # Not before it has worked; not for one failure, nor for one after a success, nor for refused connections.
                for address in (broken, broken, broken, works, broken, works, broken):
                    assert run(address.address) == (address is broken)
                for _ in range(3):
                    assert run("127.0.0.1:9") == 1
                assert server.poll() is None
                assert run(broken.address) == 1
                assert server.wait(10) == -signal.SIGKILL
        finally:
            server.kill()
