"""Checkpoints with sz folded into lm_head: the same network for us, and what vLLM's transformers backend asks of the class.

Rules read in vLLM 0.32.0 (vllm/model_executor/models/transformers): it builds AutoModel, applies lm_head itself, refuses a tensor
without a module by name, and takes the softmax scale from the `scaling=` that the attention module passes on.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engines import load_engine
from engines.build import build_engine
from ngpt.checkpoint import fold_scales, open_checkpoint, save_hf
from ngpt.errors import ConfigError, TensorValueError, UnexpectedTensorError, UnsupportedError
from ngpt.model import NGPTModel
from ngpt.training import normalize_weights_
from ngpt.weights import Weights
from tests.conftest import GOLDEN, TINY
from tests.ngpt.making import golden_tensors, write_checkpoint


def fold(source, target):
    with open_checkpoint(source) as checkpoint:
        return save_hf(fold_scales(checkpoint), target)


def test_every_golden_case_keeps_its_logits_and_its_engine_weights(golden, tmp_path):
    folder = fold(golden.folder, tmp_path / "folded")
    with open_checkpoint(folder) as folded, open_checkpoint(golden.folder) as original:
        folded.validate()
        assert folded.spec.sz_folded and "sz.weight" not in folded.names()
        ours, theirs = Weights(folded), Weights(original)
        for name in theirs.names():
            np.testing.assert_array_equal(ours.get(name), theirs.get(name), name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(golden.ids), attention_mask=torch.from_numpy(golden.mask)).logits.numpy()
    # 2e-5 is the golden data's own bound for float32; the research case is stored in bfloat16 and bounded in float64 elsewhere.
    assert golden.name.startswith("research") or np.abs(logits - golden.logits)[golden.real].max() <= 2e-5


def test_the_cpu_engine_of_a_folded_checkpoint_passes_parity_and_the_golden_logits(tmp_path):
    with np.load(GOLDEN / "gqa" / "golden.npz") as data:
        ids, logits = data["input_ids"].astype(np.int64), data["logits"]
    engine = build_engine(fold(GOLDEN / "gqa", tmp_path / "folded"), "cpu-fp32", tmp_path / "engine")
    assert json.loads((engine / "manifest.json").read_text())["parity"]["verdict"] == "pass"
    with load_engine(engine) as loaded:
        assert np.abs(loaded.logits(ids) - logits).max() <= 2e-5


def test_a_tied_head_is_untied_and_the_table_stays_unit_norm(tmp_path):
    tensors = golden_tensors()
    del tensors["lm_head.weight"]
    folder = fold(write_checkpoint(tmp_path / "tied", tensors, tie_word_embeddings=True), tmp_path / "folded")
    stored = load_file(folder / "model.safetensors")
    scaled = (tensors["model.embed_tokens.weight"].double() * tensors["sz.weight"].double() * 8.0).float()
    assert torch.equal(stored["lm_head.weight"], scaled)
    assert torch.equal(stored["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_bfloat16_head_is_stored_in_float32_and_the_rest_as_it_was(tmp_path):
    folder, original = fold(TINY, tmp_path / "folded"), load_file(TINY / "model.safetensors")
    stored = load_file(folder / "model.safetensors")
    assert original["lm_head.weight"].dtype == torch.bfloat16 and stored["lm_head.weight"].dtype == torch.float32
    assert set(stored) == set(original) - {"sz.weight"}
    assert all(torch.equal(stored[name], original[name]) for name in stored if name != "lm_head.weight")


def test_folding_in_blocks_changes_nothing(tmp_path, monkeypatch):
    whole = load_file(fold(GOLDEN / "gqa", tmp_path / "whole") / "model.safetensors")["lm_head.weight"]
    monkeypatch.setattr("ngpt.checkpoint.folded_head._BLOCK", 200)
    blocks = load_file(fold(GOLDEN / "gqa", tmp_path / "blocks") / "model.safetensors")["lm_head.weight"]
    assert torch.equal(blocks, whole)


def test_folding_twice_and_training_are_refused_by_name(tmp_path):
    folder = fold(GOLDEN / "gqa", tmp_path / "once")
    with pytest.raises(UnsupportedError, match="folded already"):
        fold(folder, tmp_path / "twice")
    with pytest.raises(UnsupportedError, match="folded"):
        normalize_weights_(AutoModelForCausalLM.from_pretrained(folder))


def test_the_norms_of_the_original_are_checked_before_they_can_no_longer_be(tmp_path):
    tensors = golden_tensors()
    tensors["lm_head.weight"][3] *= 1.5
    with pytest.raises(TensorValueError, match="row 3"):
        fold(write_checkpoint(tmp_path / "off", tensors), tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def change(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


def test_the_key_must_tell_the_truth(tmp_path):
    folder = fold(GOLDEN / "gqa", tmp_path / "folded")
    lying = shutil.copytree(GOLDEN / "gqa", tmp_path / "lying")
    with pytest.raises(UnexpectedTensorError, match=r"sz\.weight"):
        open_checkpoint(change(lying, sz_folded=True))
    with pytest.raises(ConfigError, match="sz_folded"):
        open_checkpoint(change(folder, tie_word_embeddings=True))
    with pytest.raises(StrictDataclassError, match="sz_folded"):
        AutoConfig.from_pretrained(folder)
    with pytest.raises(ConfigError, match="sz_folded"):
        open_checkpoint(change(folder, tie_word_embeddings=False, sz_folded="yes"))
    tensors = load_file(change(folder, sz_folded=True) / "model.safetensors")
    tensors["lm_head.weight"][5, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(folder) as checkpoint, pytest.raises(TensorValueError, match="lm_head"):
        checkpoint.validate()


def test_transformers_backend_head_applied_outside_gives_the_models_logits(tmp_path):
    folder = fold(GOLDEN / "gqa", tmp_path / "folded")
    stored, ids = load_file(folder / "model.safetensors"), torch.arange(12)[None]
    body = AutoModel.from_pretrained(folder, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(GOLDEN / "gqa", dtype=torch.float32)
    with torch.no_grad():
        outside = body(ids, use_cache=False, return_dict=False)[0] @ stored["lm_head.weight"].T
        assert (outside - original(ids).logits).abs().max() <= 2e-5
        lost = body(ids).last_hidden_state @ original.lm_head.weight.T  # what such a backend makes of an unfolded one
        assert (lost - original(ids).logits).abs().max() > 0.1


def test_transformers_backend_every_stored_tensor_has_a_module_or_is_the_head(tmp_path):
    stored = set(load_file(fold(GOLDEN / "gqa", tmp_path / "folded") / "model.safetensors"))
    body = AutoModel.from_pretrained(GOLDEN / "gqa")
    assert stored - {"model." + name for name, _ in body.named_parameters()} == {"lm_head.weight"}


def test_transformers_backend_rules_of_the_class():
    model = AutoModel.from_pretrained(GOLDEN / "gqa")
    assert isinstance(model, NGPTModel) and model._supports_attention_backend
    assert all(getattr(module, "is_causal", True) for module in model.modules()), "else it is taken for an encoder"
    seen = []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append((module.layer_idx, kwargs["scaling"], key.shape[1]))
        return torch.zeros_like(query.transpose(1, 2)), None

    ALL_ATTENTION_FUNCTIONS["spy"] = spy
    try:
        model.config._attn_implementation = "spy"
        model(torch.arange(4)[None], use_cache=False)
    finally:
        del ALL_ATTENTION_FUNCTIONS._local_mapping["spy"]
    # Key heads come ungrouped, and the scale multiplies: 4 = sqrt(16), where the backend's default would be 1/4.
    assert seen == [(layer, 4.0, 2) for layer in range(model.config.num_hidden_layers)]
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    plan = {pattern.removeprefix("layers.*.") for pattern in model.tp_plan}
    assert all(name.split(".", 2)[2] in plan for name in linears), "a linear outside the plan is replicated, not sharded"


def test_transformers_backend_layer_of_another_pipeline_rank_is_passed_over():
    class Elsewhere(torch.nn.Identity):
        def forward(self, h, **_):
            return h

    model, ids = AutoModel.from_pretrained(GOLDEN / "gqa"), torch.arange(8)[None]
    with torch.no_grad():
        whole = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        first = AutoModel.from_pretrained(GOLDEN / "gqa")
        for layer in range(1, len(first.layers)):
            first.layers[layer] = Elsewhere()
        assert torch.equal(first(ids, use_cache=False).last_hidden_state, whole[1])
        model.layers[0] = Elsewhere()
        assert torch.equal(model(inputs_embeds=whole[1], use_cache=False).last_hidden_state, whole[-1])
