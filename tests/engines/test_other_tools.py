"""What other people's tools find in an engine folder. The tools themselves are run by scripts/other_runtimes.py."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch

import engines.backends.onnx
from engines import load_engine
from engines.build import build_engine
from ngpt import NGPTConfig, NGPTForCausalLM
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import CheckpointError
from scripts.cli import main
from tests.conftest import TINY, Golden

SIZES = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 128, "initializer_range": 0.1, "eos_token_id": [2, 7],
}  # fmt: skip


@pytest.fixture(scope="module")
def odd_checkpoint(tmp_path_factory):
    """Heads of 12 channels that are not hidden_size / heads, one key head, two end tokens, no tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("odd") / "checkpoint"
    NGPTForCausalLM(NGPTConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("target", "channels"), [("onnx-portable", 12), ("cpu-fp32", 16)])
def test_config_json_says_what_the_graphs_cache_is(odd_checkpoint, target, channels, tmp_path):
    """optimum and transformers.js make the first cache from these two numbers, for this model_type and few others."""
    build_engine(odd_checkpoint, target, tmp_path / "engine", verify=False)
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    inputs = {i.name: i.type.tensor_type.shape.dim for i in onnx.load(tmp_path / "engine" / "model.onnx").graph.input}
    cache = inputs["past_key_values.0.key"]
    assert (config["num_key_value_heads"], config["head_dim"]) == (cache[1].dim_value, cache[3].dim_value) == (1, channels)
    assert config["model_type"] == "gemma" and "architectures" not in config
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["hidden_size"]) == (2, 4, 40)
    assert (config["vocab_size"], config["max_position_embeddings"], config["use_cache"]) == (96, 128, True)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, [2, 7], None)
    assert json.loads((tmp_path / "engine" / "genai_config.json").read_text())["model"]["decoder"]["head_size"] == channels


def test_transformers_reads_config_and_tokenizer_and_finds_no_weights_to_load(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(TINY, tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend"}))
    build_engine(tmp_path / "checkpoint", "onnx-portable", tmp_path / "engine", verify=False)
    tokenizer_config = json.loads((tmp_path / "engine" / "tokenizer_config.json").read_text())
    assert (
        tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    )  # transformers 4.57, which optimum needs, has no other
    config = AutoConfig.from_pretrained(tmp_path / "engine")
    assert (config.head_dim, config.num_key_value_heads, config.eos_token_id) == (32, 2, 2)
    text = "def main():\n    x  = 'é'"
    with load_engine(tmp_path / "engine", num_slots=1, threads=1) as engine:
        expected = engine.tokenizer.encode(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "engine")(text).input_ids == expected
    # Without this file a type has a tokenizer class of its own, which must not be taken.
    (tmp_path / "engine" / "tokenizer_config.json").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path / "engine")(text).input_ids == expected
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "engine")


@pytest.mark.parametrize("external", [True, False])
def test_transformers_js_is_told_whether_there_is_a_file_of_weights(external, tmp_path, monkeypatch):
    monkeypatch.setattr(engines.backends.onnx, "EXTERNAL_DATA_FROM", 0 if external else 64 << 20)
    build_engine(Golden("gqa").folder, "cpu-int8", tmp_path / "engine", verify=False)
    told = json.loads((tmp_path / "engine" / "config.json").read_text())["transformers.js_config"]
    assert told == {"dtype": "fp32", "use_external_data_format": external}
    assert (tmp_path / "engine" / "model.onnx_data").is_file() == external
    graph = onnx.load(tmp_path / "engine" / "model.onnx", load_external_data=False).graph
    places = {entry.value for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"}
    assert places == ({"model.onnx_data"} if external else set())


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8", "cpu-int4"])
def test_heads_of_any_size_make_a_verified_engine_that_runs_here_and_in_onnxruntime_genai(odd_checkpoint, target, tmp_path):
    import onnxruntime_genai

    build_engine(odd_checkpoint, target, tmp_path / "engine")
    manifest = json.loads((tmp_path / "engine" / "manifest.json").read_text())
    assert manifest["parity"]["verdict"] == "pass" and manifest["model"]["head_dim"] == 12
    prompts = [[5, 80, 4], [17, 9, 33, 41, 60]]
    with load_engine(tmp_path / "engine", num_slots=2, threads=1) as engine:
        ours = engine.generate(prompts, max_new_tokens=12, ignore_eos=True)
        assert ours == [engine.generate([prompt], max_new_tokens=12, ignore_eos=True)[0] for prompt in prompts]
    if target == "cpu-fp32":
        model = NGPTForCausalLM.from_pretrained(odd_checkpoint).eval()
        for prompt, tokens in zip(prompts, ours, strict=True):
            out = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].argmax(-1)
            assert out.tolist() == tokens
    model = onnxruntime_genai.Model(str(tmp_path / "engine"))
    for prompt, tokens in zip(prompts, ours, strict=True):
        tokens = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in (2, 7)), len(tokens))]
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + len(tokens), do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert list(generator.get_sequence(0)[len(prompt) :]) == tokens


def test_an_engine_is_not_taken_for_a_checkpoint(tmp_path, capsys):
    """Its config.json is of another type and for other tools; with its manifest lost it is still no checkpoint."""
    engine = build_engine(Golden("gqa").folder, "cpu-fp32", tmp_path / "engine", verify=False)
    with pytest.raises(CheckpointError, match="is an engine.*give the checkpoint that the engine was built from"):
        open_checkpoint(engine)
    (engine / "manifest.json").unlink()
    assert main(["package", str(engine), "--output", str(tmp_path / "models"), "--allow-unverified"]) == 2
    assert "manifest.json" in capsys.readouterr().err
