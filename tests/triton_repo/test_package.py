"""The repository as a folder: complete in itself, plain configuration, refusals."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from ngpt.errors import OutputExistsError, PackagingError
from triton_repo.package import MODELS, package_engine

# name -> (dtype, dims, optional), as clients of the TensorRT-LLM repositories expect them
TEXT_INPUTS = {
    "text_input": ("STRING", [1], True),  # or input_ids
    "max_tokens": ("INT32", [1], True),
    **{name: ("STRING", [-1], True) for name in ("bad_words", "stop_words")},
    **{
        name: ("INT32", [1], True)
        for name in ("num_return_sequences", "end_id", "pad_id", "top_k", "min_tokens", "min_length", "beam_width")
    },
    **{
        name: ("FP32", [1], True)
        for name in (
            "top_p", "min_p", "temperature", "length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty",
        )
    },
    "seed": ("UINT64", [1], True),
    **{
        name: ("BOOL", [1], True)
        for name in (
            "stream", "exclude_input_in_output", "return_log_probs", "return_context_logits", "return_generation_logits",
            "return_num_input_tokens", "return_num_output_tokens", "return_perf_metrics",
        )
    },
}  # fmt: skip
EXTRA_OUTPUTS = {
    "cum_log_probs": ("FP32", [-1]),
    "output_log_probs": ("FP32", [-1, -1]),
    "context_logits": ("FP32", [-1, -1]),
    "generation_logits": ("FP32", [-1, -1, -1]),
    "batch_index": ("INT32", [1]),
    "sequence_index": ("INT32", [1]),
    "num_input_tokens": ("INT32", [1]),
    "num_output_tokens": ("INT32", [1]),
    "arrival_time_ns": ("INT64", [1]),
    "first_scheduled_time_ns": ("INT64", [1]),
    "first_token_time_ns": ("INT64", [1]),
    "last_token_time_ns": ("INT64", [1]),
    "output_ids": ("INT32", [-1, -1]),
    "sequence_length": ("INT32", [-1]),
    "top_log_prob_ids": ("INT32", [-1, -1, -1]),
    "top_log_probs": ("FP32", [-1, -1, -1]),
    "finish_reason": ("STRING", [-1]),
    "stop_reason": ("STRING", [-1]),
}


def config_of(repository: Path, model: str):
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def described(tensors, *, optional: bool = True):
    def kind(tensor):
        return model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")

    rows = {tensor.name: (kind(tensor), list(tensor.dims)) for tensor in tensors}
    return {t.name: (*rows[t.name], t.optional) for t in tensors} if optional else rows


def test_ensemble_has_the_interface_of_known_clients(repository):
    config = config_of(repository, "ensemble")
    found = described(config.input)
    assert {name: found.get(name) for name in TEXT_INPUTS} == TEXT_INPUTS
    assert described(config.output, optional=False) == {"text_output": ("STRING", [-1]), **EXTRA_OUTPUTS}
    assert config.model_transaction_policy.decoupled


def test_tokens_model_has_the_interface_of_known_clients(repository):
    config = config_of(repository, "tensorrt_llm")
    inputs = described(config.input)
    assert inputs["input_ids"] == ("INT32", [-1], True)
    assert inputs["input_lengths"] == inputs["request_output_len"] == ("INT32", [1], True)
    assert inputs["stop_words_list"] == inputs["bad_words_list"] == ("INT32", [2, -1], True)
    assert inputs["seed"] == ("UINT64", [1], True)
    for name in ("end_id", "pad_id", "beam_width", "min_tokens", "min_length", "runtime_top_k"):
        assert inputs[name] == ("INT32", [1], True), name
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty", "len_penalty")
    for name in ("runtime_top_p", "temperature", *penalties):
        assert inputs[name] == ("FP32", [1], True), name
    for name in ("streaming", "stop", "exclude_input_in_output", "return_log_probs", "return_perf_metrics"):
        assert inputs[name] == ("BOOL", [1], True), name
    outputs = described(config.output, optional=False)
    assert outputs == EXTRA_OUTPUTS
    (step,) = config.ensemble_scheduling.step
    assert step.model_name == "ensemble"
    known = described(config_of(repository, "ensemble").input)
    assert inputs == {name: known[name] for name in inputs} and dict(step.input_map) == {name: name for name in inputs}


def test_pre_and_postprocessing_have_the_interface_of_known_clients(repository):
    before, after = config_of(repository, "preprocessing"), config_of(repository, "postprocessing")
    assert described(before.input) == {
        "QUERY": ("STRING", [1], False),
        "REQUEST_OUTPUT_LEN": ("INT32", [1], False),
        "BAD_WORDS_DICT": ("STRING", [-1], True),
        "STOP_WORDS_DICT": ("STRING", [-1], True),
        "END_ID": ("INT32", [1], True),
        "PAD_ID": ("INT32", [1], True),
    }
    assert described(before.output, optional=False) == {
        "INPUT_ID": ("INT32", [-1]),
        "REQUEST_INPUT_LEN": ("INT32", [1]),
        "BAD_WORDS_IDS": ("INT32", [2, -1]),
        "STOP_WORDS_IDS": ("INT32", [2, -1]),
        "REQUEST_OUTPUT_LEN": ("INT32", [-1]),
        "OUT_END_ID": ("INT32", [1]),
        "OUT_PAD_ID": ("INT32", [1]),
    }
    assert described(after.input) == {
        "TOKENS_BATCH": ("INT32", [-1, -1], False),
        "SEQUENCE_LENGTH": ("INT32", [-1], False),
    }
    assert described(after.output, optional=False) == {"OUTPUT": ("STRING", [-1])}


def test_nothing_is_imported_that_is_not_copied_in(repository):
    """numpy, tokenizers, the runtime library and, for requests with a guide, llguidance are all that a repository may need."""
    allowed = {"numpy", "tokenizers", "onnxruntime", "llguidance", "triton_python_backend_utils"} | set(sys.stdlib_module_names)
    for model in MODELS:
        folder = repository / model / "1"
        own = {path.stem for path in folder.iterdir()}
        for source in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(source.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                foreign = {name.split(".")[0] for name in names} - allowed - own
                assert not foreign, f"{source.relative_to(repository)} imports {foreign}"


def test_an_engine_without_a_passed_verdict_is_refused(tiny_engine_folder, tmp_path):
    for verdict in (None, "fail"):
        engine = tmp_path / f"engine-{verdict}"
        shutil.copytree(tiny_engine_folder, engine)
        manifest = json.loads((engine / "manifest.json").read_text())
        manifest["parity"] = None if verdict is None else {**(manifest["parity"] or {}), "verdict": verdict}
        (engine / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(PackagingError, match=f"expected pass, found {verdict or 'missing'}.*--allow-unverified"):
            package_engine(engine, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        made = package_engine(engine, tmp_path / f"allowed-{verdict}", allow_unverified=True)
        assert sorted(path.name for path in made.iterdir()) == sorted(MODELS)


def test_an_existing_folder_is_refused_and_left_alone(tiny_engine_folder, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError, match="there"):
        package_engine(tiny_engine_folder, tmp_path / "there", allow_unverified=True)
    assert list((tmp_path / "there").iterdir()) == []


def test_a_damaged_engine_is_refused(tiny_engine_folder, tmp_path):
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine_folder, engine)
    graph = engine / json.loads((engine / "manifest.json").read_text())["graph"]
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(PackagingError, match=graph.name):
        package_engine(engine, tmp_path / "out", allow_unverified=True)
    with pytest.raises(PackagingError, match="manifest"):
        package_engine(tmp_path, tmp_path / "out", allow_unverified=True)


def test_a_full_disk_leaves_nothing_behind(tiny_engine_folder, tmp_path, monkeypatch):
    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", no_space)
    with pytest.raises(PackagingError, match="No space left"):
        package_engine(tiny_engine_folder, tmp_path / "out", allow_unverified=True)
    assert list(tmp_path.iterdir()) == []


SERVES = """
import json, sys, types
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
sys.modules["triton_python_backend_utils"] = types.SimpleNamespace(
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=1, Logger=types.SimpleNamespace(log_warn=print, log_error=print))
version = sys.argv[1]
config = text_format.Parse(open(version + "/../config.pbtxt").read(), model_config_pb2.ModelConfig())
sys.path.insert(0, version)
import model
served = model.TritonPythonModel()
config = json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True))
served.initialize({"model_config": config, "model_name": "ensemble"})
scheduler = served.engine.scheduler
print("found", scheduler.prefill_chunk, scheduler.max_queue, scheduler.runner.num_slots, model.__file__, type(scheduler).__module__)
served.finalize()
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"prefill_chunk": 7, "max_queue": 3, "num_slots": 2}, "7 3 2"), ({}, "256 256 8")],
)
def test_what_is_asked_of_the_packager_reaches_the_served_models_scheduler(tiny_engine_folder, tmp_path, options, expected):
    made = package_engine(tiny_engine_folder, tmp_path / "models", allow_unverified=True, threads=1, **options)
    version = made / "ensemble" / "1"
    run = subprocess.run([sys.executable, "-c", SERVES, str(version)], cwd=tmp_path, capture_output=True, text=True, check=True)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("found")]
    assert line == f"found {expected} {version}/model.py engines.runtime.scheduler"


def test_options_out_of_range_are_named(tiny_engine_folder, tmp_path):
    for name in ("num_slots", "max_queue", "prefill_chunk", "threads"):
        with pytest.raises(PackagingError, match=f"{name}: expected at least 1, found 0"):
            package_engine(tiny_engine_folder, tmp_path / "out", allow_unverified=True, **{name: 0})
