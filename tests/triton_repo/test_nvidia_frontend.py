"""The requests of NVIDIA's own OpenAI frontend for Triton, sent to the served repository.

Its program needs the server's in-process Python module, which no package index has. Kept here is what it sends to a model of TensorRT-LLM's
layout (server repository, python/openai, commit e1db8a60: engine/utils/triton.py): names, shapes, what it leaves out, and how it sums usage.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from engines.runtime import Guide
from tests.triton_repo.conftest import PROMPT
from triton_repo.client import responses
from triton_repo.package import package_engine
from triton_repo.server import TritonServer

SCHEMA = json.dumps(
    {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
)


def request(prompt, *, stream, max_tokens=16, echo=None, guide=None, **options):
    """As its function for the TensorRT-LLM backend makes it. Chat has no echo, and then nothing is said of the prompt."""
    inputs = {"text_input": [[prompt.encode()]], "stream": np.bool_([[stream]]), "max_tokens": np.int32([[max_tokens]])}
    kinds = {
        "top_p": np.float32,
        "temperature": np.float32,
        "frequency_penalty": np.float32,
        "presence_penalty": np.float32,
        "seed": np.uint64,
    }
    for name, value in options.items():
        inputs[name] = [[word.encode() for word in value]] if name == "stop_words" else kinds[name]([[value]])
    if echo is not None:
        inputs["exclude_input_in_output"] = np.bool_([[not echo]])
    if guide is not None:
        inputs |= {"guided_decoding_guide_type": [[b"json_schema"]], "guided_decoding_guide": [[guide.encode()]]}
    inputs |= {"return_num_input_tokens": np.bool_([[True]]), "return_num_output_tokens": np.bool_([[True]])}
    return {name: np.asarray(value, object) if isinstance(value, list) else value for name, value in inputs.items()}


def answered(url, tensors):
    """The text, and the usage: the prompt's tokens from the first response that has them, the others' numbers added up."""
    text, prompt, completion = "", None, 0
    for result in responses(url, "ensemble", tensors):
        (piece,) = result.as_numpy("text_output").reshape(-1)  # it refuses several
        text += piece.decode()
        given, made = result.as_numpy("num_input_tokens"), result.as_numpy("num_output_tokens")
        if given is not None and made is not None:
            assert given.dtype == made.dtype == np.int32
            prompt = given.item() if prompt is None else prompt
            completion += made.item()
    return text, (prompt, completion)


@pytest.mark.parametrize("stream", [False, True])
def test_completions(served, stream):
    prompt = len(served.engine.tokenizer.encode(PROMPT))
    expected = served.engine.generate_text(PROMPT, 16)
    assert answered(served.url, request(PROMPT, stream=stream, echo=False)) == (expected, (prompt, 16))
    if not stream:
        assert answered(served.url, request(PROMPT, stream=stream, echo=True))[0] == PROMPT + expected
    sampled = {"temperature": 0.5, "top_p": 0.75, "seed": 9, "frequency_penalty": 0.5, "presence_penalty": 0.25}
    expected = served.engine.generate_text(PROMPT, 16, **sampled)
    assert answered(served.url, request(PROMPT, stream=stream, echo=False, **sampled))[0] == expected
    word = served.engine.generate_text(PROMPT, 16)[5:8]
    assert word not in answered(served.url, request(PROMPT, stream=stream, echo=False, stop_words=[word]))[0]


def test_a_chat_that_is_streamed_is_the_answer_alone_and_one_that_is_not_begins_with_the_prompt(served):
    """It says nothing of the prompt for chat. With TensorRT-LLM's default, which is ours, that one is in an answer that is not streamed."""
    expected = served.engine.generate_text(PROMPT, 16)
    assert answered(served.url, request(PROMPT, stream=True))[0] == expected
    assert answered(served.url, request(PROMPT, stream=False))[0] == PROMPT + expected


def test_a_repository_packaged_for_it_answers_a_chat_with_the_answer_alone(served, tiny_engine_folder, tmp_path):
    models = package_engine(
        tiny_engine_folder, tmp_path / "models", allow_unverified=True, threads=1, num_slots=2, exclude_input_in_output=True
    )
    expected = served.engine.generate_text(PROMPT, 16)
    with TritonServer(models, start_timeout=90) as server:
        for stream in (False, True):
            assert answered(server.grpc_url, request(PROMPT, stream=stream))[0] == expected
        assert answered(server.grpc_url, request(PROMPT, stream=False, echo=True))[0] == PROMPT + expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_tools_schema_is_enforced(served, stream):
    text, _ = answered(
        served.url, request(PROMPT, stream=stream, echo=False, max_tokens=200, guide=SCHEMA, temperature=0.5, seed=1)
    )
    assert set(json.loads(text)) == {"a"}
    guide = Guide("json_schema", SCHEMA)
    assert text == served.engine.generate_text(PROMPT, 200, guide=guide, temperature=0.5, seed=1)
