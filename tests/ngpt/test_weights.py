"""Canonical weights: folding is exact, and the whole of spec + rope + weights reproduces the golden logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ngpt.checkpoint import open_checkpoint, save_hf
from ngpt.errors import MissingTensorError
from ngpt.weights import Weights
from tests.doubles.reference import Reference
from tests.ngpt.making import write_checkpoint

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ["gqa", "gqa-left-padded", "llama3-rope-bias", "dead-mlp", "research-checkpoint", "research-train-py"]


def golden(name):
    data = np.load(GOLDEN / name / "golden.npz")
    ids = data["input_ids"]
    mask = data["attention_mask"].astype(bool) if "attention_mask" in data else np.ones(ids.shape, bool)
    return data, ids, np.where(mask, mask.cumsum(1) - 1, 1), mask


@pytest.mark.parametrize("name", CASES)
def test_spec_rope_and_folding_reproduce_the_golden_logits(name):
    # Also for the research checkpoint: its bfloat16 matrices are exact in float64, and its golden output was
    # computed from them in float64, so nothing wider than the common tolerance is needed.
    data, ids, positions, mask = golden(name)
    with open_checkpoint(GOLDEN / name) as checkpoint:
        logits, hidden = Reference(Weights(checkpoint))(ids, positions, mask)
    assert np.abs(logits - data["logits"])[mask].max() < 5e-6
    if "hidden_states" in data:
        assert np.abs(hidden - data["hidden_states"])[:, mask].max() < 5e-7


@pytest.mark.parametrize("fault", ["inverse_scale", "swapped_head", "skipped_layer"])
def test_the_golden_check_can_fail(fault):
    data, ids, positions, mask = golden("gqa")
    logits, _ = Reference(Weights(open_checkpoint(GOLDEN / "gqa")), faults=[fault])(ids, positions, mask)
    assert np.abs(logits - data["logits"])[mask].max() > 0.05


def test_folding_follows_the_formulas():
    raw = {name: tensor.double().numpy() for name, tensor in load_file(GOLDEN / "gqa" / "model.safetensors").items()}
    weights = Weights(open_checkpoint(GOLDEN / "gqa"))
    spec, layer = weights.spec, "model.layers.1."
    up = raw[layer + "mlp.up_proj.weight"] * raw[layer + "mlp.suv.weight"] * spec.suv_scale * 8.0
    np.testing.assert_array_equal(weights.get("layers.1.mlp.up.weight"), up.astype(np.float32))
    q_scale = (raw[layer + "self_attn.sqk.weight"][:, 0] / 0.125) ** 2
    np.testing.assert_array_equal(weights.get("layers.1.attn.q_scale"), q_scale.astype(np.float32))
    head = raw["lm_head.weight"] * raw["sz.weight"] / 0.125
    np.testing.assert_array_equal(weights.get("head.weight"), head.astype(np.float32))


def test_trap_3_alpha_is_taken_by_absolute_value():
    raw = load_file(GOLDEN / "gqa" / "model.safetensors")["model.layers.0.attn_alpha"]
    lr = Weights(open_checkpoint(GOLDEN / "gqa")).get("layers.0.attn.lr")
    assert (raw < 0).any()
    np.testing.assert_allclose(lr, np.abs(raw.numpy()) * 0.4, rtol=1e-6)


def test_trap_6_tied_head_is_scaled_and_the_table_is_not(tmp_path):
    raw = load_file(GOLDEN / "gqa" / "model.safetensors")
    del raw["lm_head.weight"]
    weights = Weights(open_checkpoint(write_checkpoint(tmp_path, raw, tie_word_embeddings=True)))
    table = raw["model.embed_tokens.weight"]
    np.testing.assert_array_equal(weights.get("embed"), table.numpy())
    scaled = (table.double() * raw["sz.weight"].double() * 8.0).float().numpy()
    np.testing.assert_array_equal(weights.get("head.weight"), scaled)


def test_shapes_are_known_without_reading_and_are_right():
    for name in CASES:
        weights = Weights(open_checkpoint(GOLDEN / name))
        for tensor in weights.names():
            value = weights.get(tensor)
            assert value.shape == weights.shape(tensor)
            assert value.dtype == np.float32 and value.flags.c_contiguous and value.flags.writeable


def test_an_unknown_name_is_named():
    with pytest.raises(MissingTensorError, match=r"layers\.9"):
        Weights(open_checkpoint(GOLDEN / "gqa")).get("layers.9.attn.q.weight")


def test_folding_in_blocks_changes_nothing(monkeypatch):
    whole = Weights(open_checkpoint(GOLDEN / "gqa")).get("head.weight")
    monkeypatch.setattr("ngpt.weights._BLOCK", 100)
    np.testing.assert_array_equal(Weights(open_checkpoint(GOLDEN / "gqa")).get("head.weight"), whole)


def test_research_halves_carry_through_a_saved_folder(tmp_path):
    research = open_checkpoint(GOLDEN / "research-checkpoint")
    saved = open_checkpoint(save_hf(research, tmp_path / "hf"))
    assert saved.spec == research.spec
    stored = torch.load(GOLDEN / "research-checkpoint" / "ckpt.pt", weights_only=True)["model"]
    c_fc = stored["transformer.h.2.c_fc.weight"]
    assert torch.equal(saved.get("model.layers.2.mlp.up_proj.weight"), c_fc[:256])
    assert torch.equal(saved.get("model.layers.2.mlp.gate_proj.weight"), c_fc[256:])
    for name in research.names():
        assert torch.equal(saved.get(name), research.get(name))
