#!/usr/bin/env python3
"""Health check of a served model repository: one real inference, because a crashed model process still reports ready.

    python3 probe.py [--model ensemble] [--http 127.0.0.1:8000] [--metrics 127.0.0.1:8002] [--timeout 20]

Exit code 0: a token was generated; or the server is busy (its queue is full, or no answer came in time) but counters of
finished work moved meanwhile: a probe must not kill a server for being loaded. 1: neither. Standard library only: it is
copied into images.
"""

import argparse
import json
import sys
import time
import urllib.error
import urllib.request

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
REQUESTS = {
    "ensemble": {"text_input": "a", "max_tokens": 1, "stream": False},
    "tensorrt_llm": {"text_input": "a", "sampling_param_max_tokens": 1, "streaming": False},  # the llmapi repository
}
REQUESTS["tensorrt_llm_bls"] = REQUESTS["ensemble"]


def progress(address, timeout):
    """The sum of the counters; None where metrics cannot be read."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=timeout) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(COUNTERS))
    except (OSError, ValueError):
        return None


def check(options):
    """None if the server works, else what is wrong."""
    end = time.monotonic() + options.timeout
    before = progress(options.metrics, 5)
    url = f"http://{options.http}/v2/models/{options.model}/generate"
    try:
        with urllib.request.urlopen(url, json.dumps(REQUESTS[options.model]).encode(), timeout=options.timeout) as response:
            answer = json.load(response)
        return None if "text_output" in answer else f"expected text_output, found {answer}"
    except urllib.error.HTTPError as error:
        problem = f"{url} answered {error.code}: {error.read(300).decode(errors='replace')}"
        if not any(words in problem for words in FULL):
            return problem
    except (OSError, ValueError) as error:
        problem = f"no answer from {url} within {options.timeout:g} s ({error})"
    while before is not None:
        after = progress(options.metrics, 5)
        if after is not None and after > before:
            return None
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return f"{problem}; and no other request has got on"


def main():
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ensemble", choices=sorted(REQUESTS))
    parser.add_argument("--http", default="127.0.0.1:8000", help="host:port of the server's HTTP endpoint")
    parser.add_argument("--metrics", default="127.0.0.1:8002", help="host:port of its metrics")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds")
    problem = check(parser.parse_args())
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
