"""Repositories for TensorRT-LLM: their configuration, and the Python stages served for real by the pip server.

TensorRT-LLM itself runs nowhere here. In the engine flow, this project's tokens model takes the place of the backend "tensorrtllm": it has the same
tensors. In the PyTorch flow, tests/doubles/tensorrt_llm.py takes the place of the library.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.probe import COUNTERS
from engines.parity import Check, ParityReport
from engines.parity.subject import subject_of
from engines.record import record_verdict
from engines.runtime.manifest import describe_file, read_manifest, write_manifest
from ngpt.errors import PackagingError
from tests.conftest import ROOT, TINY
from tests.triton_repo.conftest import PROMPT, SLOTS, Served
from tests.triton_repo.test_package import config_of, described
from tests.triton_repo.test_probe import probe
from tests.triton_repo.test_serving import PROMPTS, text_request
from triton_repo.client import RequestRefused, generate_text, responses, stream_text
from triton_repo.interface import INPUTS, MODEL, OUTPUTS, TEXT, inputs
from triton_repo.llmapi import package_checkpoint
from triton_repo.package import package_engine
from triton_repo.server import TritonServer

BATCH = 16
BLS = "tensorrt_llm_bls"
TEXT_MODELS = ("ensemble", BLS)
UNKNOWN = {
    *(tensor.name for row in INPUTS if row.backend is None for tensor in row.tensors(MODEL)),
    *(name for row in INPUTS for name in row.older),
}
"""Inputs of our own model that TensorRT-LLM's backend does not have."""
UNMADE = {row.tokens.name for row in OUTPUTS if row.tokens is not None and not row.backend}


@pytest.fixture(scope="session")
def trtllm_engine(tiny_engine_folder, tmp_path_factory) -> Path:
    """The form of an engine folder of TensorRT-LLM as engines.trtllm writes it, with an engine that nothing could load."""
    folder = tmp_path_factory.mktemp("trtllm") / "engine"
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "rank0.engine").write_bytes(b"not an engine")
    (folder / "engine" / "config.json").write_text(json.dumps({"build_config": {"max_batch_size": BATCH}}))
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "rank0.safetensors").write_bytes(b"what it was built from")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tiny_engine_folder / name).is_file():
            shutil.copyfile(tiny_engine_folder / name, folder / name)
    tiny = read_manifest(tiny_engine_folder)
    target = replace(tiny.target, name="h100-trtllm", runtime="tensorrt_llm", providers=(), executed=False)
    files = {path.relative_to(folder).as_posix(): describe_file(path) for path in folder.rglob("*") if path.is_file()}
    write_manifest(folder, replace(tiny, target=target, graph="engine/rank0.engine", files=files, parity=None))
    # A verdict that nobody reached, on these files: what is tested here comes after it.
    subject = subject_of(read_manifest(folder)).to_dict()
    checks = [Check("none: made for a test", 0.0, 0.0, 0.0, "", 1)]
    record_verdict(folder, ParityReport("pass", {"verdict": "pass"}, checks, subject=subject))
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
    shutil.copytree(repository / "ensemble", models / "tensorrt_llm")
    config = models / "tensorrt_llm" / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "ensemble"', 'name: "tensorrt_llm"', 1))
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
    assert found["gpt_model_path"] == "/srv/models/tensorrt_llm/1/engine/engine"
    assert found["kv_cache_free_gpu_mem_fraction"] == "0.8"
    inside = trtllm_repository / found["gpt_model_path"].removeprefix("/srv/models/")
    assert {"rank0.engine", "config.json"} == {path.name for path in inside.iterdir()}
    assert not list(trtllm_repository.rglob("*.safetensors"))  # the checkpoint is as large as the engine, and not needed
    assert not list((trtllm_repository / "tensorrt_llm").rglob("*.py"))


def test_its_tensors_are_those_of_our_tokens_model(trtllm_repository, repository):
    """Only those that the backend does not know are missing; scalars lose their second dimension on the way in."""
    theirs, ours = config_of(trtllm_repository, "tensorrt_llm"), config_of(repository, "tensorrt_llm")
    made = described(theirs.input)
    assert {name: kind[:2] for name, kind in made.items()} == {
        name: kind[:2] for name, kind in described(ours.input).items() if name not in UNKNOWN
    }
    assert {name for name, kind in made.items() if not kind[2]} == {"input_ids", "input_lengths", "request_output_len"}
    outputs = described(ours.output, optional=False)
    assert described(theirs.output, optional=False) == {name: kind for name, kind in outputs.items() if name not in UNMADE}
    for tensor in theirs.input:
        scalar = list(tensor.dims) == [1]
        assert tensor.HasField("reshape") == scalar and tensor.allow_ragged_batch == (not scalar), tensor.name


def test_the_other_models_are_those_that_onnx_engines_get(trtllm_repository, repository):
    assert {path.name for path in trtllm_repository.iterdir()} == {
        "tensorrt_llm", "preprocessing", "postprocessing", *TEXT_MODELS,
    }  # fmt: skip
    for model in ("preprocessing", "postprocessing"):
        assert config_of(trtllm_repository, model) == config_of(repository, model)
    config = config_of(trtllm_repository, BLS)
    known = described(config_of(repository, "ensemble").input)
    needed = {"text_input", "max_tokens"}
    assert config.name == BLS and described(config.input) == {
        name: (*kind[:2], name not in needed) for name, kind in known.items() if name in described(config.input)
    }
    assert {tensor.name for _, tensor in inputs(TEXT)} <= set(described(config.input))
    assert config.instance_group[0].count == SLOTS and config_of(repository, "ensemble").instance_group[0].count == 1
    mine, its = repository / "ensemble" / "1", trtllm_repository / BLS / "1"
    theirs = {path.relative_to(its) for path in its.rglob("*.py")}
    folder = Path("triton_repo/templates/trtllm_backend")
    assert theirs - {path.relative_to(mine) for path in mine.rglob("*.py")} == {folder / "link.py", folder / "__init__.py"}
    for name in theirs - {Path("model.py"), folder / "link.py", folder / "__init__.py"}:
        assert (its / name).read_bytes() == (mine / name).read_bytes()
    for name, source in (("model.py", "text.py"), (folder / "link.py", "link.py")):
        assert (its / name).read_bytes() == (ROOT / folder / source).read_bytes()


def test_the_ensemble_joins_tensors_of_equal_kinds(trtllm_repository, repository):
    config, ours = config_of(trtllm_repository, "ensemble"), config_of(repository, "ensemble")
    assert config.platform == "ensemble" and not config.backend
    text = described(ours.input)
    assert {name: kind[:2] for name, kind in described(config.input).items()} == {
        tensor.name: text[tensor.name][:2] for row, tensor in inputs(TEXT) if row.backend is not None or row.option == "prompt"
    }
    outputs = described(ours.output, optional=False)
    assert described(config.output, optional=False) == {
        name: kind for name, kind in outputs.items() if name not in UNMADE | {"output_ids", "sequence_length"}
    }
    kinds = {name: kind[0] for name, kind in described(config.input).items()}
    for step in config.ensemble_scheduling.step:
        model = config_of(trtllm_repository, step.model_name)
        takes, gives = described(model.input), described(model.output, optional=False)
        for name, source in step.input_map.items():
            assert takes[name][0] == kinds[source], (step.model_name, name)
        needed = {name for name, (_, _, optional) in takes.items() if not optional}
        assert needed <= set(step.input_map), step.model_name
        kinds |= {target: gives[name][0] for name, target in step.output_map.items()}
    for name, (kind, _) in described(config.output, optional=False).items():
        assert kinds[name] == kind
    used = {source for step in config.ensemble_scheduling.step for source in step.input_map.values()}
    assert set(described(config.input)) <= used, "an input of the ensemble that no step reads is an error"


def test_more_slots_than_the_engines_batch_are_refused(trtllm_engine, tmp_path):
    with pytest.raises(PackagingError, match=f"at most {BATCH} .max_batch_size., found {BATCH + 1}"):
        package_engine(trtllm_engine, tmp_path / "out", num_slots=BATCH + 1)
    for wrong in ({"mount": "models"}, {"kv_cache_fraction": 0.0}, {"kv_cache_fraction": 1.5}):
        with pytest.raises(PackagingError, match=next(iter(wrong))):
            package_engine(trtllm_engine, tmp_path / "out", **wrong)
    bare = tmp_path / "bare"
    shutil.copytree(trtllm_engine, bare)
    manifest = read_manifest(bare)
    (bare / "engine" / "config.json").unlink()
    write_manifest(bare, replace(manifest, files={k: v for k, v in manifest.files.items() if k != "engine/config.json"}))
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


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_options_pass_through(stood_in, served, model):
    sampled = {"temperature": 0.9, "seed": 7, "top_k": 20, "repetition_penalty": 1.3}
    cases = [sampled, {"end_id": -1}, {"min_tokens": 9, "presence_penalty": 0.5}]
    # The ensemble forbids a word as it is spelled alone, not after a space as well.
    for extra in cases + ([{"bad_words": ["self"]}] if model == BLS else []):
        expected = generate_text(served.url, PROMPT, max_tokens=24, **extra)
        assert generate_text(stood_in.url, PROMPT, max_tokens=24, model=model, **extra) == expected, extra


def test_stop_words_and_everything_that_can_be_returned(stood_in, served):
    options = {"max_tokens": 40, "stop_words": ["\n"], "end_id": -1}
    assert generate_text(stood_in.url, PROMPT, model=BLS, **options) == generate_text(served.url, PROMPT, **options)
    flags = {f"return_{name}": True for name in ("log_probs", "context_logits", "generation_logits", "num_output_tokens")}
    tensors = text_request(PROMPT, 6, **flags, return_perf_metrics=True, end_id=np.int32(-1))
    (ours,) = responses(served.url, "ensemble", tensors)
    names = ("text_output", "output_log_probs", "cum_log_probs", "context_logits", "generation_logits", "num_output_tokens")
    for model in TEXT_MODELS:
        (its,) = responses(stood_in.url, model, tensors)
        for name in names:
            np.testing.assert_array_equal(its.as_numpy(name), ours.as_numpy(name), err_msg=f"{model} {name}")
        assert its.as_numpy("first_token_time_ns") < its.as_numpy("last_token_time_ns")


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_refusals_keep_their_words(stood_in, model):
    with pytest.raises(RequestRefused, match="beam_width: expected 1, found 3"):
        generate_text(stood_in.url, PROMPT, max_tokens=4, beam_width=3, model=model)


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_what_the_backend_has_no_input_for_is_refused_by_name(stood_in, served, model):
    with pytest.raises(RequestRefused, match="min_p"):
        generate_text(stood_in.url, PROMPT, max_tokens=4, min_p=0.1, temperature=1.0, seed=1, model=model)
    guide = text_request(PROMPT, 4) | {"guided_decoding_guide_type": np.asarray([[b"json"]], object)}
    with pytest.raises(RequestRefused, match="guided_decoding_guide_type"):
        list(responses(stood_in.url, model, guide))
    assert generate_text(served.url, PROMPT, max_tokens=4, min_p=1.0, temperature=9.0, seed=1) == generate_text(
        served.url, PROMPT, max_tokens=4
    )  # our own engine does it: what has the largest probability alone is left


def test_a_closed_stream_stops_the_request_in_the_tokens_model(stood_in):
    stood_in.wait_for(lambda now: now["ngpt_requests_active"] == 0)
    time.sleep(0.3)  # what earlier requests did has been published by now
    before = stood_in.metrics()["ngpt_requests_cancelled"]
    stream = stream_text(stood_in.url, PROMPT, max_tokens=400, end_id=-1, model=BLS)
    next(stream)
    stream.close()
    stood_in.wait_for(lambda now: now["ngpt_requests_cancelled"] == before + 1 and now["ngpt_requests_active"] == 0)


def test_many_requests_at_once_through_the_ensemble(stood_in, served):
    """Not through `tensorrt_llm_bls`: with many of its calls at once, server 2.51 may hang or end."""
    prompts = PROMPTS * 3
    expected = {prompt: served.engine.generate_text(prompt, 16) for prompt in PROMPTS}
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(3):
            found = list(pool.map(lambda prompt: "".join(stream_text(stood_in.url, prompt, max_tokens=16)), prompts))
            assert found == [expected[prompt] for prompt in prompts]


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_the_health_check_knows_both(stood_in, model):
    run = probe(stood_in.server.http_url, stood_in.server.metrics_url, timeout=20, model=model)
    assert run.returncode == 0, run.stderr


def test_the_ensembles_answers_are_counted_where_the_health_check_looks(stood_in):
    def count():
        with urllib.request.urlopen(f"http://{stood_in.server.metrics_url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(COUNTERS[2]))

    before = count()
    assert len(list(stream_text(stood_in.url, PROMPT, max_tokens=9, end_id=-1))) == count() - before == 9


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
    with pytest.raises(RequestRefused, match="sampling_param_min_p"):  # which that runtime's model has no input for
        ask(llmapi.url, PROMPT, 4, sampling_param_min_p=np.float32(0.1))
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
