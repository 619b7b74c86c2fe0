"""An answer that is cut is never reported as whole: the engine's process dies, or the server is told to stop, with requests in flight."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines import load_engine
from ngpt.errors import ServerError
from tests.triton_repo.conftest import PROMPT
from triton_repo.client import RequestRefused, generate_text, generate_tokens, stream_text
from triton_repo.server import TritonServer

TOKENS, AT_ONCE = 480, 24


@pytest.fixture(scope="module")
def whole(tiny_engine_folder):
    """The text that every answer must be, unless it is an error."""
    with load_engine(tiny_engine_folder, threads=1) as engine:
        return engine.generate_text(PROMPT, TOKENS, ignore_eos=True)


def ask(url, number):
    """One request, streamed or not, for text or for tokens; what came, or the error."""
    options = {"max_tokens": TOKENS, "end_id": -1, "timeout": 60}
    try:
        if number % 3 == 0:
            return "".join(stream_text(url, PROMPT, **options))
        if number % 3 == 1:
            return generate_text(url, PROMPT, **options)
        return len(generate_tokens(url, [1, 5, 9], **options))
    except ServerError as error:
        return error


def process_of(repository, model):
    """The process of a Python model."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 1) for line in found.splitlines()[1:]]
    return next(int(pid) for pid, args in rows if "python_backend_stub" in args and f"{repository.resolve()}/{model}/" in args)


def generated(server):
    """Tokens that were generated so far, the probe's one excepted."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("ngpt_generated_tokens{")) > 1


def judged(answers, whole):
    """(whole answers, errors); anything else is a lie."""
    good = [answer for answer in answers if answer in (whole, TOKENS)]
    errors = [answer for answer in answers if isinstance(answer, ServerError)]
    lies = [answer for answer in answers if answer not in good and answer not in errors]
    assert not lies, f"{len(lies)} of {len(answers)} answers are cut and called whole, such as {str(lies[0])[-60:]!r}"
    return good, errors


@pytest.mark.parametrize("how", ["the engine's process is killed", "the server is told to stop"])
def test_what_is_cut_is_an_error(how, repository, whole, tmp_path):
    server = TritonServer(repository, log_path=tmp_path / "log.txt", start_timeout=90, stop_timeout=10)
    with server, ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(ask, server.grpc_url, number) for number in range(AT_ONCE)]
        deadline = time.monotonic() + 30
        while not generated(server) and time.monotonic() < deadline:
            time.sleep(0.05)
        if how == "the server is told to stop":
            os.kill(server.pid, signal.SIGTERM)
        else:
            os.kill(process_of(repository, "tensorrt_llm"), signal.SIGKILL)
        _, errors = judged([answer.result(120) for answer in asked], whole)
    assert errors, "all of them were answered before the end"
    for error in errors:
        if isinstance(error, RequestRefused):
            assert any(word in str(error) for word in ("engine", "tensorrt_llm", "unloaded", "stub", "model")), str(error)
