#!/usr/bin/env python3
"""Health check of a served model repository: one real inference, because a crashed model process still reports ready.

    python3 probe.py [--model NAME[,NAME...]] [--http 127.0.0.1:8000] [--metrics 127.0.0.1:8002] [--timeout 20] [--kill-after N]

Exit code 0: each model generated a token; or the server is busy (its queue is full, or no answer came in time) but counters
of finished work moved meanwhile: a probe must not kill a server for being loaded. 1: neither. A server that takes no
connections is not busy: it has begun to stop. Standard library only: it is copied into images.

--kill-after is for Docker, which starts a container again when it ends, and not when it is unhealthy: a server that has
worked, takes connections, and has failed N checks in a row is ended by SIGKILL. The container needs an init (`init: true`):
the kernel keeps that signal from a first process.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

# What grows only while tokens are made: this project's, TensorRT-LLM's, and the answers that its ensemble has turned into
# text. Triton's count of requests to a decoupled model would not do: it grows when a request is taken, by a hung model as well.
COUNTERS = (
    "ngpt_generated_tokens{",
    'nv_trt_llm_general_metrics{general_type="iteration_counter"',
    'nv_inference_request_success{model="postprocessing"',
)
# Of this project's scheduler, and of Triton's own queue. The status says too little: server 2.51 answers 400 to every
# refusal of a model.
FULL = ("queue is full", "maximum queue size")
# The smallest request, by what a model takes: text or tokens, and the names for their number in this project and TensorRT-LLM.
PROMPTS = {"text_input": ({"text_input": "a"}, "text_output"), "input_ids": ({"input_ids": [0]}, "output_ids")}
ONE = ("max_tokens", "sampling_param_max_tokens", "request_output_len", "input_lengths")
NOT_STREAMED = ("stream", "streaming")
FAILURES = Path(tempfile.gettempdir()) / "ngpt-probe-failures"


class RefusedError(Exception):
    """Nothing listens."""


def progress(address, model, timeout):
    """The sum of the counters, of this model where it has some of its own; None where metrics cannot be read."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=timeout) as response:
            lines = [line for line in response.read().decode().splitlines() if line.startswith(COUNTERS)]
        own = [line for line in lines if line.startswith(COUNTERS[0]) and f'model="{model}"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in own or lines)
    except (OSError, ValueError):
        return None


def ask(url, body=None, timeout=20.0):
    """The JSON that comes back. A connection that is not taken is another matter than an answer that does not come."""
    try:
        with urllib.request.urlopen(url, body and json.dumps(body).encode(), timeout=max(0.1, timeout)) as response:
            return json.load(response)
    except urllib.error.HTTPError:
        raise
    except OSError as error:
        if isinstance(getattr(error, "reason", error), ConnectionError):
            raise RefusedError(f"no connection to {url} ({error})") from error
        raise


def request_of(metadata):
    """The request that makes one token, and the output that it gives; no request for a model that makes none."""
    names = [tensor["name"] for tensor in metadata["inputs"]]
    for prompt, (body, output) in PROMPTS.items():
        if prompt in names:
            return body | {name: 1 for name in ONE if name in names} | {
                name: False for name in NOT_STREAMED if name in names
            }, output
    return None, None


def check(options, model, end):
    """None if the model works, else what is wrong."""
    before = progress(options.metrics, model, min(5, max(0.1, end - time.monotonic())))
    url = f"http://{options.http}/v2/models/{urllib.parse.quote(model, safe='')}"
    try:
        body, output = request_of(ask(url, timeout=end - time.monotonic()))
        if body is None:
            return f"{url}: expected a model with the input {' or '.join(PROMPTS)}"
        url += "/generate"
        answer = ask(url, body, end - time.monotonic())
        return None if output in answer else f"expected {output} from {url}, found {answer}"
    except urllib.error.HTTPError as error:
        problem = f"{url} answered {error.code}: {error.read(300).decode(errors='replace')}"
        if not any(words in problem for words in FULL):
            return problem
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"no answer from {url} within {options.timeout:g} s ({error})"
    while before is not None:
        after = progress(options.metrics, model, 5)
        if after is not None and after > before:
            return None
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return f"{problem}; and no other request has got on"


def kill_after(limit, failed):
    """Count failures in a row, from the first success on; at the limit end every tritonserver that this user may end."""
    if not failed:
        FAILURES.write_text("0")
        return
    if not FAILURES.is_file():  # it has not worked yet: loading takes as long as it takes
        return
    count = int(FAILURES.read_text() or 0) + 1
    FAILURES.write_text(str(count))
    if count < limit:
        return
    FAILURES.unlink()
    for name in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if name.read_text().strip() == "tritonserver":
                print(f"ending process {name.parent.name} after {count} failures", file=sys.stderr)
                os.kill(int(name.parent.name), signal.SIGKILL)


def main():
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = os.environ.get("NGPT_MODEL", "ensemble")
    parser.add_argument("--model", default=usual, help=f"text or tokens, several with commas; NGPT_MODEL, or {usual}")
    parser.add_argument("--http", default="127.0.0.1:8000", help="host:port of the server's HTTP endpoint")
    parser.add_argument("--metrics", default="127.0.0.1:8002", help="host:port of its metrics")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for all of them")
    parser.add_argument("--kill-after", type=int, default=0, metavar="N", help="end the server after so many failures in a row")
    options = parser.parse_args()
    end = time.monotonic() + options.timeout
    try:
        problem = next(filter(None, (check(options, model, end) for model in options.model.split(","))), None)
    except RefusedError as refused:
        print(refused, file=sys.stderr)
        return 1
    if options.kill_after > 0:
        kill_after(options.kill_after, problem)
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
