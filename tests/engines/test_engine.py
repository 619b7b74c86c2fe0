"""Engines as a user loads them, against golden data; and the same folder in onnxruntime-genai."""

import json

import numpy as np
import onnx
import pytest
import torch

import engines.backends.onnx
from engines import load_engine
from engines.build import build_engine
from tests.conftest import Golden

LOGIT_ERROR = 2e-5


@pytest.mark.parametrize("target", ["cpu-fp32", "onnx-portable"])
def test_logits_and_greedy_text_match_golden(golden, target, tmp_path):
    build_engine(golden.folder, target, tmp_path / "engine", verify=False)
    with load_engine(tmp_path / "engine", num_slots=2, threads=1) as engine:
        logits = engine.logits(golden.ids, golden.mask)
        assert logits.dtype == np.float32 and logits.shape == golden.logits.shape
        assert np.abs(logits - golden.logits)[golden.real].max() <= LOGIT_ERROR
        prompts = [row[real].tolist() for row, real in zip(golden.ids, golden.real, strict=True)]
        new = golden.greedy.shape[1] - golden.ids.shape[1]
        out = engine.generate(prompts, max_new_tokens=new, ignore_eos=True)
    np.testing.assert_array_equal(np.array(out), golden.greedy[:, -new:])


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
@pytest.mark.parametrize("context", [64, 2])
def test_a_research_model_of_short_context_is_built_and_passes(context, target, tmp_path):
    folder = Golden("research-train-py").folder
    if context == 2:
        stored = torch.load(Golden("research-checkpoint").folder / "ckpt.pt", weights_only=True)
        stored["model_args"]["block_size"] = context
        folder = tmp_path / "ckpt.pt"
        torch.save(stored, folder)
    manifest = json.loads((build_engine(folder, target, tmp_path / "engine") / "manifest.json").read_text())
    assert manifest["parity"]["verdict"] == "pass", manifest["parity"]["failed_checks"]
    assert manifest["parity"]["decode_steps"] == context // 2


def test_large_weights_go_to_external_data_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(engines.backends.onnx, "EXTERNAL_DATA_FROM", 0)
    case = Golden("gqa")
    steps = []
    build_engine(
        case.folder, "cpu-fp32", tmp_path / "engine", verify=False, progress=lambda what, done: steps.append((what, done))
    )
    assert (tmp_path / "engine" / "model.onnx_data").stat().st_size > 600_000
    assert (tmp_path / "engine" / "model.onnx").stat().st_size < 100_000
    with load_engine(tmp_path / "engine", num_slots=2, threads=1) as engine:
        assert np.abs(engine.logits(case.ids) - case.logits).max() <= LOGIT_ERROR
    assert any("layers.1.mlp.up" in what for what, _ in steps)
    assert all(a <= b for (_, a), (_, b) in zip(steps, steps[1:], strict=False))


def test_weights_stream_instead_of_piling_up(tmp_path):
    """What is alive at once while the graph is written is one matrix and its folding, not the model."""
    import tracemalloc

    from export.precision import ONNX_RUNTIME
    from export.weights import DeployedWeights
    from ngpt import NGPTConfig, NGPTForCausalLM
    from ngpt.checkpoint import open_checkpoint
    from ngpt.weights import Weights

    config = NGPTConfig(
        vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    NGPTForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    total = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.backends.onnx, "EXTERNAL_DATA_FROM", 0)
        weights = DeployedWeights(Weights(checkpoint))
        tracemalloc.start()
        engines.backends.onnx.export_graph(weights, "ort", ONNX_RUNTIME["fp32"], tmp_path / "model.onnx")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total > 40_000_000 and peak < total / 4


@pytest.mark.parametrize("target", ["cpu-fp32", "onnx-portable"])
def test_onnxruntime_genai_runs_the_same_folder(target, tmp_path):
    import onnxruntime_genai

    case = Golden("gqa")
    build_engine(case.folder, target, tmp_path / "engine", verify=False)
    parameters = onnxruntime_genai.GeneratorParams(onnxruntime_genai.Model(str(tmp_path / "engine")))
    length = case.greedy.shape[1]
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    model = onnxruntime_genai.Model(str(tmp_path / "engine"))
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(case.ids[:1].astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    # min_length bans eos, which the golden continuation does not; compare up to the first one.
    eos = np.flatnonzero(case.greedy[0, case.ids.shape[1] :] == 2)
    end = case.ids.shape[1] + int(eos[0]) if len(eos) else length
    np.testing.assert_array_equal(generator.get_sequence(0)[:end], case.greedy[0, :end])


def test_the_graph_follows_the_conventional_names(tmp_path):
    build_engine(Golden("gqa").folder, "cpu-fp32", tmp_path / "engine", verify=False)
    graph = onnx.load(tmp_path / "engine" / "model.onnx").graph
    assert [i.name for i in graph.input][:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert [o.name for o in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]
    assert all(i.type.tensor_type.elem_type == onnx.TensorProto.INT64 for i in graph.input[:3])
    assert json.loads((tmp_path / "engine" / "genai_config.json").read_text())["model"]["type"] == "decoder"


def test_the_manifest_tells_where_the_engine_came_from(tiny_engine_folder):
    manifest = json.loads((tiny_engine_folder / "manifest.json").read_text())
    assert all(value.startswith("sha256:") and len(value) == 71 for value in manifest["digests"].values())
    assert manifest["parity"]["verdict"] == "pass" and manifest["tools"]["onnxruntime"]
    listed = set(manifest["files"]) | {"manifest.json"}
    assert listed == {path.name for path in tiny_engine_folder.iterdir()}
