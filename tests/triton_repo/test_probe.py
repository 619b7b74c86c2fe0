"""The health check of deploy/: against the real server, and against servers that hang, are full, or are gone."""

import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deploy.probe import FULL
from tests.conftest import ROOT

FULL_STATUS = 400  # what server 2.51 makes of UNAVAILABLE


def probe(http, metrics="127.0.0.1:9", timeout=5, model="ensemble"):
    command = [sys.executable, ROOT / "deploy" / "probe.py", "--http", http, "--metrics", metrics]
    return subprocess.run([*command, "--timeout", str(timeout), "--model", model], capture_output=True, text=True, timeout=60)


def test_a_working_server_passes(served):
    before = served.metrics()["ngpt_generated_tokens"]
    run = probe(served.server.http_url, served.server.metrics_url, timeout=20)
    assert run.returncode == 0, run.stderr
    served.wait_for(lambda now: now["ngpt_generated_tokens"] > before)


def test_a_server_that_is_not_there_fails_with_the_reason():
    run = probe("127.0.0.1:9", timeout=1)
    assert run.returncode == 1 and "no answer from http://127.0.0.1:9/v2/models/ensemble/generate" in run.stderr


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


@contextlib.contextmanager
def fake(status, moving):
    """A double of the server's HTTP and metrics endpoints: `status` 0 never answers; `moving` lets the counters grow."""
    end = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            if not status:
                end.wait(10)
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"error": "the queue is full: expected"}' if status == FULL_STATUS else b"{}")

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            tokens = time.monotonic_ns() if moving else 7
            self.wfile.write(f'# HELP\nngpt_generated_tokens{{model="tensorrt_llm"}} {tokens}\n'.encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
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
    with fake(status, moving) as address:
        run = probe(address, address, timeout=0.5)
        assert (run.returncode == 0) == healthy, run.stderr
        assert bool(run.stderr) != healthy
