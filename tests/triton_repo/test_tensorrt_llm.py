"""Repositories for TensorRT-LLM: their configuration, and the Python stages served for real by the pip server.

TensorRT-LLM itself runs nowhere here. In the engine flow, this project's tokens model takes the place of the backend "tensorrtllm": it has the same
tensors. In the PyTorch flow, tests/doubles/tensorrt_llm.py takes the place of the library.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.runtime.manifest import describe_file, read_manifest, write_manifest
from ngpt.errors import PackagingError
from tests.conftest import ROOT, TINY
from tests.triton_repo.conftest import PROMPT, SLOTS, Served
from tests.triton_repo.test_package import TEXT_INPUTS, config_of, described
from tests.triton_repo.test_probe import probe
from tests.triton_repo.test_serving import PROMPTS, text_request
from triton_repo.client import RequestRefused, generate_text, responses, stream_text
from triton_repo.llmapi import package_checkpoint
from triton_repo.package import package_engine
from triton_repo.server import TritonServer

BATCH = 16
TEXT_MODELS = ("ensemble", "tensorrt_llm_bls")


@pytest.fixture(scope="session")
def trtllm_engine(tiny_engine_folder, tmp_path_factory) -> Path:
    """The form of an engine folder of TensorRT-LLM, with an engine that nothing could load."""
    folder = tmp_path_factory.mktemp("trtllm") / "engine"
    folder.mkdir()
    (folder / "rank0.engine").write_bytes(b"not an engine")
    (folder / "config.json").write_text(json.dumps({"build_config": {"max_batch_size": BATCH}}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tiny_engine_folder / name).is_file():
            shutil.copyfile(tiny_engine_folder / name, folder / name)
    tiny = read_manifest(tiny_engine_folder)
    target = replace(tiny.target, name="h100-trtllm", runtime="tensorrt_llm", providers=(), executed=False)
    files = {path.name: describe_file(path) for path in folder.iterdir()}
    write_manifest(folder, replace(tiny, target=target, graph="rank0.engine", files=files))
    return folder


@pytest.fixture(scope="session")
def trtllm_repository(trtllm_engine, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("models") / "trtllm"
    return package_engine(trtllm_engine, output, num_slots=SLOTS, mount="/srv/models", kv_cache_fraction=0.8)


@pytest.fixture(scope="module")
def stood_in(trtllm_repository, repository, served, tmp_path_factory):
    """The repository served with this project's tokens model in place of TensorRT-LLM's."""
    models = tmp_path_factory.mktemp("stood-in") / "models"
    shutil.copytree(trtllm_repository, models)
    shutil.rmtree(models / "tensorrt_llm")
    shutil.copytree(repository / "tensorrt_llm", models / "tensorrt_llm")
    with TritonServer(models, start_timeout=90) as server:
        yield Served(server, served.engine)


def parameters(config):
    return {name: value.string_value for name, value in config.parameters.items()}


# --- the engine flow


def test_the_engine_goes_to_tensorrt_llms_backend(trtllm_repository):
    config = config_of(trtllm_repository, "tensorrt_llm")
    assert config.backend == "tensorrtllm" and config.max_batch_size == SLOTS
    assert config.model_transaction_policy.decoupled
    found = parameters(config)
    assert found["gpt_model_type"] == "inflight_fused_batching"
    assert found["gpt_model_path"] == "/srv/models/tensorrt_llm/1/engine"
    assert found["kv_cache_free_gpu_mem_fraction"] == "0.8"
    inside = trtllm_repository / found["gpt_model_path"].removeprefix("/srv/models/")
    assert {"rank0.engine", "config.json"} <= {path.name for path in inside.iterdir()}
    assert not list((trtllm_repository / "tensorrt_llm").rglob("*.py"))


def test_its_tensors_are_those_of_our_tokens_model(trtllm_repository, repository):
    """Only `min_length`, which the backend does not know, is missing; scalars lose their second dimension on the way in."""
    theirs, ours = config_of(trtllm_repository, "tensorrt_llm"), config_of(repository, "tensorrt_llm")
    assert described(theirs.input) == {k: v for k, v in described(ours.input).items() if k != "min_length"}
    assert described(theirs.output, optional=False) == described(ours.output, optional=False)
    for tensor in theirs.input:
        scalar = list(tensor.dims) == [1]
        assert tensor.HasField("reshape") == scalar and tensor.allow_ragged_batch == (not scalar), tensor.name


def test_every_other_model_is_the_one_that_onnx_engines_get(trtllm_repository, repository):
    assert {path.name for path in trtllm_repository.iterdir()} == {
        "tensorrt_llm", "preprocessing", "postprocessing", *TEXT_MODELS,
    }  # fmt: skip
    for model in ("preprocessing", "postprocessing"):
        assert config_of(trtllm_repository, model) == config_of(repository, model)
    for model in TEXT_MODELS:
        config = config_of(trtllm_repository, model)
        assert config.name == model and described(config.input) == TEXT_INPUTS
        for own in ("model.py", "serving_inputs.py", "serving_triton.py"):
            mine, its = repository / "ensemble" / "1" / own, trtllm_repository / model / "1" / own
            assert its.read_bytes() == mine.read_bytes()
        link = trtllm_repository / model / "1" / "engine_link.py"
        assert link.read_bytes() == (ROOT / "triton_repo" / "templates" / "common" / "bls_link.py").read_bytes()


def test_more_slots_than_the_engines_batch_are_refused(trtllm_engine, tmp_path):
    with pytest.raises(PackagingError, match=f"at most {BATCH} .max_batch_size., found {BATCH + 1}"):
        package_engine(trtllm_engine, tmp_path / "out", num_slots=BATCH + 1)
    for wrong in ({"mount": "models"}, {"kv_cache_fraction": 0.0}, {"kv_cache_fraction": 1.5}):
        with pytest.raises(PackagingError, match=next(iter(wrong))):
            package_engine(trtllm_engine, tmp_path / "out", **wrong)
    bare = tmp_path / "bare"
    shutil.copytree(trtllm_engine, bare)
    manifest = read_manifest(bare)
    (bare / "config.json").unlink()
    write_manifest(bare, replace(manifest, files={k: v for k, v in manifest.files.items() if k != "config.json"}))
    with pytest.raises(PackagingError, match="config.json of trtllm-build"):
        package_engine(bare, tmp_path / "out")
    write_manifest(bare, replace(manifest, target=replace(manifest.target, runtime="tpu")))
    with pytest.raises(PackagingError):
        package_engine(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_a_client_cannot_tell(stood_in, served, model):
    for prompt in PROMPTS:
        expected = generate_text(served.url, prompt, max_tokens=20)
        assert generate_text(stood_in.url, prompt, max_tokens=20, model=model) == expected
        assert "".join(stream_text(stood_in.url, prompt, max_tokens=20, model=model)) == expected


def test_options_words_and_probabilities_pass_through(stood_in, served):
    options = {"temperature": 0.9, "seed": 7, "top_k": 20, "repetition_penalty": 1.3}
    for extra in (options, {"end_id": -1}, {"stop_words": ["\n"], "end_id": -1}, {"bad_words": ["self"], "min_tokens": 9}):
        both = [generate_text(url, PROMPT, max_tokens=24, **extra) for url in (stood_in.url, served.url)]
        assert both[0] == both[1], extra
    flags = {f"return_{name}": True for name in ("log_probs", "context_logits", "generation_logits", "num_output_tokens")}
    tensors = text_request(PROMPT, 6, **flags, return_perf_metrics=True, end_id=np.int32(-1))
    (its,), (ours) = [list(responses(url, "ensemble", tensors)) for url in (stood_in.url, served.url)]
    for name in ("text_output", "output_log_probs", "cum_log_probs", "context_logits", "generation_logits", "num_output_tokens"):
        np.testing.assert_array_equal(its.as_numpy(name), ours[0].as_numpy(name), err_msg=name)
    assert its.as_numpy("first_token_time_ns") < its.as_numpy("last_token_time_ns")


def test_refusals_keep_their_words(stood_in):
    with pytest.raises(RequestRefused, match="beam_width: expected 1, found 3"):
        generate_text(stood_in.url, PROMPT, max_tokens=4, beam_width=3)


def test_a_closed_stream_stops_the_request_in_the_tokens_model(stood_in):
    before = stood_in.wait_for(lambda now: now["ngpt_requests_active"] == 0)["ngpt_requests_cancelled"]
    stream = stream_text(stood_in.url, PROMPT, max_tokens=400, end_id=-1)
    next(stream)
    stream.close()
    stood_in.wait_for(lambda now: now["ngpt_requests_cancelled"] == before + 1 and now["ngpt_requests_active"] == 0)


def test_a_few_requests_at_once(stood_in, served):
    expected = [served.engine.generate_text(prompt, 16) for prompt in PROMPTS[:3]]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda prompt: generate_text(stood_in.url, prompt, max_tokens=16), PROMPTS[:3]))
    assert found == expected


# --- the PyTorch flow


@pytest.fixture(scope="module")
def llmapi(tiny_engine_folder, served, tmp_path_factory):
    double = ROOT / "tests" / "doubles" / "tensorrt_llm.py"
    output = tmp_path_factory.mktemp("llmapi") / "models"
    package_checkpoint(TINY, output, allow_unverified=True, modules=[double], num_slots=SLOTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NGPT_DOUBLE_ENGINE", str(tiny_engine_folder))
        patch.setenv("NGPT_DOUBLE_ROOT", str(ROOT))
        with TritonServer(output, start_timeout=90, probe=lambda url: ask(url, "a", 1)) as server:
            yield Served(server, served.engine)


def ask(url, prompt, max_tokens, **options):
    tensors = {"text_input": np.asarray([prompt.encode()], object)}
    tensors |= {"sampling_param_max_tokens": np.asarray([max_tokens], np.int32)}
    tensors |= {name: np.asarray([value]) for name, value in options.items()}
    return list(responses(url, "tensorrt_llm", tensors))


def text_of(result, name="text_output"):
    return result.as_numpy(name)[0].decode()


def test_llmapi_answers_whole_and_streamed(llmapi):
    for prompt in PROMPTS[:3]:
        expected = llmapi.engine.generate_text(prompt, 12)
        (whole,) = ask(llmapi.url, prompt, 12)
        assert text_of(whole) == expected
        stream = [text_of(result) for result in ask(llmapi.url, prompt, 12, streaming=True)]
        assert len(stream) == 12 and stream[-1] == expected  # each holds the whole text so far
    flags = {"return_finish_reason": True, "return_cumulative_logprob": True}
    (result,) = ask(llmapi.url, PROMPT, 5, **flags)
    assert text_of(result, "finish_reason") == "length" and result.as_numpy("cumulative_logprob")[0] < 0


def test_the_health_check_knows_llmapi(llmapi):
    assert probe(llmapi.server.http_url, llmapi.server.metrics_url, timeout=20, model="tensorrt_llm").returncode == 0


def test_llmapi_refuses_and_stops(llmapi):
    with pytest.raises(RequestRefused, match="sampling_param_max_tokens: expected at least 1, found 0"):
        ask(llmapi.url, PROMPT, 0)
    with pytest.raises(RequestRefused, match="best_of: expected 1"):
        ask(llmapi.url, PROMPT, 4, sampling_param_best_of=np.int32(2))
    with ThreadPoolExecutor(1) as pool:
        tensors = {"text_input": np.asarray([PROMPT.encode()], object), "streaming": np.asarray([True])}
        tensors |= {"sampling_param_max_tokens": np.asarray([450], np.int32)}
        running = pool.submit(lambda: list(responses(llmapi.url, "tensorrt_llm", tensors, request_id="one")))
        while not running.done():
            stop = {"text_input": np.asarray([b""], object), "stop": np.asarray([True])}
            list(responses(llmapi.url, "tensorrt_llm", stop, request_id="one"))
            time.sleep(0.02)
        assert len(running.result()) < 400


def test_llmapi_repository_is_what_the_library_reads(tmp_path):
    module = tmp_path / "modeling.py"
    module.write_text("")
    with pytest.raises(PackagingError, match="without a parity verdict.*--allow-unverified"):
        package_checkpoint(TINY, tmp_path / "models")
    made = package_checkpoint(TINY, tmp_path / "models", allow_unverified=True, modules=[module], tensor_parallel=2)
    config = config_of(made, "tensorrt_llm")
    assert config.backend == "python" and config.max_batch_size == 0 and config.model_transaction_policy.decoupled
    inputs = described(config.input)
    assert inputs["text_input"] == ("STRING", [-1], False) and inputs["sampling_param_stop"] == ("STRING", [-1], True)
    assert inputs["sampling_param_seed"] == ("UINT64", [1], True)
    for name in ("best_of", "top_k", "max_tokens"):
        assert inputs[f"sampling_param_{name}"] == ("INT32", [1], True)
    for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty"):
        assert inputs[f"sampling_param_{name}"] == ("FP32", [1], True)
    assert described(config.output, optional=False) == {
        **{name: ("STRING", [-1]) for name in ("text_output", "finish_reason", "stop_reason")},
        "cumulative_logprob": ("FP32", [-1]),
    }
    import yaml

    settings = yaml.safe_load((made / "tensorrt_llm" / "1" / "model.yaml").read_text())
    assert settings["tensor_parallel_size"] == 2 and settings["triton_config"] == {"max_batch_size": 0, "decoupled": True}
    kept = {path.name for path in (made / "tensorrt_llm" / "1" / settings["model"]).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= kept
    assert (made / "tensorrt_llm" / "1" / "modules" / "modeling.py").is_file()
    with pytest.raises(PackagingError, match="missing.py"):
        package_checkpoint(TINY, tmp_path / "other", allow_unverified=True, modules=[tmp_path / "missing.py"])
