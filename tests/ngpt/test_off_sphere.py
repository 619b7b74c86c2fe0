"""Checkpoints whose vectors are off the unit sphere: a little (a merged LoRA) or a lot, taken, refused, or projected back."""

import json

import numpy as np
import pytest
import torch

from engines import load_engine
from engines.build import build_engine
from engines.parity.effect import logit_effect
from export.trtllm.fp8 import activation_scale
from export.weights import DeployedWeights
from ngpt.checkpoint import fold_scales, normalize, open_checkpoint, save_hf
from ngpt.checkpoint.value_checks import OFF_SPHERE_LIMIT
from ngpt.errors import TensorValueError
from ngpt.weights import Weights
from scripts.cli import main
from tests.doubles.torch_reference import TorchReference
from tests.ngpt.making import GOLDEN, golden_tensors, write_checkpoint

EMBED, UP, DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"


def scaled(folder, factors, dtype=torch.float32):
    """Golden gqa with vectors scaled: {tensor: {row or column: factor}}."""
    tensors = golden_tensors()
    for name, vectors in factors.items():
        for index, factor in vectors.items():
            (tensors[name][:, index] if name == DOWN else tensors[name][index])[:] *= factor
    return write_checkpoint(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})


SMALL = {EMBED: {3: 1.003, 5: 0.998}, UP: {7: 0.9985}, DOWN: {1: 1.001}}
LARGE = {EMBED: {3: 3.0}, UP: {7: 0.5, 8: 1.2}, DOWN: {1: 2.0}}


def logits(folder, ids):
    return TorchReference(folder, "float64").run(tuple(ids))[0]


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_a_small_deviation_is_built_as_it_is_and_the_worst_tensor_is_named(target, tmp_path, caplog):
    folder = scaled(tmp_path / "merged", SMALL)
    engine = build_engine(folder, target, tmp_path / "engine")
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["parity"]["verdict"] == "pass", manifest["parity"]["failed_checks"]
    (note,) = manifest["flags"]["checkpoint_notes"]
    assert f"3 tensor(s), worst {EMBED}: row 3 has norm 1.003, 2 row(s)" in note
    assert [record.getMessage() for record in caplog.records if record.name == "ngpt"] == [f"{folder}: {note}"]
    if target == "cpu-fp32":
        ids = np.arange(20)
        with load_engine(engine) as loaded:
            assert np.abs(loaded.logits(ids[None])[0] - logits(folder, ids)).max() <= 2e-5, "what the file says is what is built"
        assert np.abs(logits(folder, ids) - logits(GOLDEN / "gqa", ids)).max() > 1e-3, "and that is not the projected network"


def test_a_large_deviation_is_refused_with_two_ways_on(tmp_path):
    folder = scaled(tmp_path / "off", LARGE)
    with pytest.raises(TensorValueError, match=r"embed_tokens.*row 3.*--normalize.*--allow-off-sphere"):
        build_engine(folder, "cpu-fp32", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    with open_checkpoint(folder) as checkpoint, pytest.raises(TensorValueError):
        fold_scales(checkpoint)


def test_the_limit_lies_where_it_is_said_to(tmp_path):
    for number, (factor, refused) in enumerate(
        [(1 + 0.9 * OFF_SPHERE_LIMIT, False), (1 + 1.1 * OFF_SPHERE_LIMIT, True), (1.004, False), (1.02, True)]
    ):
        with open_checkpoint(scaled(tmp_path / str(number), {UP: {0: factor}})) as checkpoint:
            if refused:
                with pytest.raises(TensorValueError, match="up_proj"):
                    checkpoint.validate()
            else:
                checkpoint.validate()
                assert len(checkpoint.notes) == 1


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8", "onnx-portable"])
def test_a_large_deviation_is_built_on_demand_and_agrees_with_what_was_built(target, tmp_path):
    folder = scaled(tmp_path / "off", LARGE)
    engine = build_engine(folder, target, tmp_path / "engine", off_sphere="allow")
    parity = json.loads((engine / "manifest.json").read_text())["parity"]
    assert parity["verdict"] == "pass", parity["failed_checks"]
    ids = np.arange(20)
    if target != "cpu-int8":
        with load_engine(engine) as loaded:
            assert np.abs(loaded.logits(ids[None])[0] - logits(folder, ids)).max() <= 2e-5


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_zero_embeddings_as_vocabularies_are_padded_with_are_built_on_demand(target, tmp_path):
    folder = scaled(tmp_path / "padded", {EMBED: dict.fromkeys(range(240, 256), 0.0)})
    engine = build_engine(folder, target, tmp_path / "engine", off_sphere="allow")
    assert json.loads((engine / "manifest.json").read_text())["parity"]["verdict"] == "pass"


def test_folding_keeps_a_deviation_that_is_allowed(tmp_path):
    folder, ids = scaled(tmp_path / "off", LARGE), np.arange(12)
    with open_checkpoint(folder, off_sphere="allow") as checkpoint:
        folded = save_hf(fold_scales(checkpoint), tmp_path / "folded")
    assert np.abs(logits(folded, ids) - logits(folder, ids)).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalizing_projects_back_and_keeps_the_bits_of_what_was_on_the_sphere(dtype, tmp_path):
    folder = scaled(tmp_path / "off", LARGE, dtype)
    with open_checkpoint(folder, off_sphere="allow") as original:
        projected, changes = normalize(original)
        with open_checkpoint(save_hf(projected, tmp_path / "out")) as result:
            result.validate()
            assert result.notes == ()
            assert {change.name: (change.vectors, change.of) for change in changes} == {
                EMBED: (1, 256),
                UP: (2, 256),
                DOWN: (1, 256),
            }
            for name in original.names():
                before, after = original.get(name), result.get(name)
                assert before.dtype == after.dtype
                touched = LARGE.get(name, {})
                rows = [i for i in range(before.shape[1 if name == DOWN else 0]) if i not in touched]
                pick = (slice(None), rows) if name == DOWN else rows
                assert torch.equal(before[pick], after[pick]), name
                if touched:
                    whole = float((after.double() - before.double()).norm() / before.double().norm())
                    told = next(change.relative for change in changes if change.name == name)
                    assert told == pytest.approx(whole, rel=0.01)


def test_normalizing_in_blocks_changes_nothing(tmp_path, monkeypatch):
    folder = scaled(tmp_path / "off", LARGE)

    def tensors():
        with open_checkpoint(folder, off_sphere="allow") as checkpoint:
            projected, _ = normalize(checkpoint)
            return {name: projected.get(name).clone() for name in projected.names()}

    whole = tensors()
    monkeypatch.setattr("ngpt.checkpoint.normalized._BLOCK", 300)
    blocks = tensors()
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_a_zero_embedding_cannot_be_projected(tmp_path):
    tensors = golden_tensors()
    tensors[EMBED][3] = 0
    with open_checkpoint(write_checkpoint(tmp_path, tensors)) as checkpoint:
        projected, changes = normalize(checkpoint)
        assert changes == []
        with pytest.raises(TensorValueError, match="a zero vector has no direction"):
            projected.validate()


def test_the_effect_on_logits_is_measured(tmp_path):
    folder = scaled(tmp_path / "off", LARGE)
    with open_checkpoint(folder) as before, open_checkpoint(GOLDEN / "gqa") as after:
        effect = logit_effect(before, after)
        assert effect.kl_max > effect.kl_mean > 1e-6 and 0 < effect.max_abs_logit < 2 * effect.largest_logit
        assert effect.texts == 0 and 0 < effect.top1_agreement <= 1
        same = logit_effect(after, after)
        assert (same.kl_max, same.max_abs_logit, same.top1_agreement) == (0, 0, 1)


def test_the_command_refuses_projects_or_takes_it_as_it_is(tmp_path, capsys, caplog):
    folder = scaled(tmp_path / "off", LARGE)
    assert main(["convert", "--checkpoint", str(folder), "--output", str(tmp_path / "no")]) == 2
    assert "--normalize" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["convert", "--checkpoint", str(folder), "--output", str(tmp_path / "yes"), "--normalize"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith(UP))
    assert "2 of 256" in line and "0.5 to 1.2" in line
    assert "logits   KL" in out and "first choice the same" in out
    with open_checkpoint(tmp_path / "yes") as checkpoint:
        checkpoint.validate()
    arguments = ["convert", "--checkpoint", str(folder), "--output", str(tmp_path / "as-it-is"), "--allow-off-sphere"]
    assert main(arguments) == 0 and f"worst {EMBED}" in caplog.text
    with open_checkpoint(tmp_path / "as-it-is") as result, open_checkpoint(folder) as original:
        assert all(torch.equal(result.get(name), original.get(name)) for name in original.names())
    assert main(["convert", "--checkpoint", str(GOLDEN / "gqa"), "--output", str(tmp_path / "same"), "--normalize"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_range_of_fp8_products_knows_embeddings_off_the_sphere(tmp_path):
    for number, (factors, bound) in enumerate([({}, 1.0), ({EMBED: {3: 1.003}}, 1.0), ({EMBED: {3: 3.0}}, 3.0)]):
        with open_checkpoint(scaled(tmp_path / str(number), factors)) as checkpoint:
            weights = DeployedWeights(Weights(checkpoint))
            assert activation_scale(weights, "layers.0.attn.q") * 448 == pytest.approx(bound, rel=1e-6)
            assert activation_scale(weights, "layers.1.attn.q") * 448 == activation_scale(weights, "layers.0.mlp.up") * 448 == 1.0
