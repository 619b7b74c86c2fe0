"""The table of tensors: what it says of a checkpoint and of the network fit each other, for every kind of network."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.trtllm.layout import rank_layout
from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt import tensor_names
from ngpt.checkpoint import expected_tensors, open_checkpoint
from ngpt.errors import MissingTensorError, UnsupportedError
from ngpt.spec import NGPTSpec
from ngpt.tensor_names import Canonical, Expected, Name, Row, RowsScaled, Scaled, canonical_tensors
from ngpt.weights import Weights
from tests.conftest import GOLDEN
from tests.ngpt.making import write_checkpoint

FLAGS = ("attention_bias", "mlp_bias", "gated", "tied", "sz_folded")


@pytest.fixture(scope="module")
def specs():
    """A network for each combination of what the table asks of a spec."""
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        base = checkpoint.spec
    choices = [dict(zip(FLAGS, values, strict=True)) for values in itertools.product((False, True), repeat=len(FLAGS))]
    return [dataclasses.replace(base, **flags) for flags in choices if not (flags["tied"] and flags["sz_folded"])]


def test_every_tensor_of_the_network_is_made_of_stored_ones_and_every_stored_one_is_used(specs):
    for spec in specs:
        stored, made = expected_tensors(spec), canonical_tensors(spec)
        used = set()
        for tensor in made.values():
            used.add(tensor.stored)
            if isinstance(tensor.fold, RowsScaled):
                used.add(tensor.fold.by)
        assert used | {name for name, tensor in stored.items() if not tensor.required} == set(stored)


def test_vectors_that_are_folded_into_rows_are_used_whole_and_once(specs):
    for spec in specs:
        stretches = {}
        for name, tensor in canonical_tensors(spec).items():
            if isinstance(tensor.fold, RowsScaled) and not name.endswith(".bias"):
                rows = tensor.shape[0]
                stretches.setdefault(tensor.fold.by, []).extend(range(tensor.fold.part * rows, (tensor.fold.part + 1) * rows))
        assert len(stretches) == spec.num_layers + (not spec.sz_folded)
        for vector, rows in stretches.items():
            assert sorted(rows) == list(range(expected_tensors(spec)[vector].shape[0])), vector


def test_the_models_own_state_is_what_the_table_expects():
    from ngpt import NGPTConfig, NGPTForCausalLM

    for gated, bias in itertools.product((False, True), repeat=2):
        config = NGPTConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, attention_bias=bias, mlp_bias=bias, gated_mlp=gated,
        )  # fmt: skip
        expected = expected_tensors(NGPTSpec.from_config(config.to_dict()))
        state = NGPTForCausalLM(config).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {n: e.shape for n, e in expected.items()}


def test_names_are_taken_apart_and_others_are_refused(specs):
    for spec in specs:
        for name in canonical_tensors(spec):
            layer, part, kind = Name.of(name)
            assert name == ("" if layer is None else f"layers.{layer}.") + part + (f".{kind}" if kind else "")
    assert Name.of("layers.12.attn.q.bias") == (12, "attn.q", "bias") and Name.of("layers.0.attn.q") == (0, "attn.q", "")
    for wrong in ("", "layers.01.attn.q", "layers.attn", "model.layers.1.attn.q.weight", "layers.1.attn.q.weight.more"):
        with pytest.raises(ValueError, match="no canonical name"):
            Name.of(wrong)


@pytest.fixture
def gain(monkeypatch):
    """A variant of the architecture: a vector a layer on the MLP's branch, in the table and nowhere else."""
    row = Row("layers.{}.mlp.gain", "model.layers.{}.mlp_gain", ("hidden",), fold=Scaled("mlp_alpha_scale", then="absolute"))
    where = next(i for i, other in enumerate(tensor_names.TABLE) if other.name == "layers.{}.mlp.lr")
    monkeypatch.setattr(tensor_names, "TABLE", (*tensor_names.TABLE[:where], row, *tensor_names.TABLE[where:]))


def test_a_row_is_all_that_the_reader_and_the_weights_need_for_another_tensor(gain, tmp_path):
    with pytest.raises(MissingTensorError, match=r"model\.layers\.0\.mlp_gain"):
        open_checkpoint(GOLDEN / "gqa")
    tensors = load_file(GOLDEN / "gqa" / "model.safetensors")
    tensors |= {f"model.layers.{layer}.mlp_gain": torch.full((64,), -0.5 - layer) for layer in range(3)}
    with open_checkpoint(write_checkpoint(tmp_path, tensors)) as checkpoint:
        weights = Weights(checkpoint)
        assert weights.names().index("layers.1.mlp.gain") + 1 == weights.names().index("layers.1.mlp.lr")
        assert weights.shape("layers.1.mlp.gain") == (64,)
        np.testing.assert_allclose(weights.get("layers.1.mlp.gain"), 1.5 * checkpoint.spec.mlp_alpha_scale, rtol=1e-6)
        assert expected_tensors(checkpoint.spec)["model.layers.2.mlp_gain"] == Expected((64,))
        wanted = Canonical((64,), "model.layers.2.mlp_gain", Scaled("mlp_alpha_scale", then="absolute"))
        assert canonical_tensors(checkpoint.spec)["layers.2.mlp.gain"] == wanted


def test_another_tensor_is_not_dropped_by_a_conversion_that_has_no_place_for_it(gain, tmp_path):
    tensors = load_file(GOLDEN / "gqa" / "model.safetensors")
    tensors |= {f"model.layers.{layer}.mlp_gain": torch.ones(64) for layer in range(3)}
    with open_checkpoint(write_checkpoint(tmp_path, tensors)) as checkpoint:
        with pytest.raises(UnsupportedError, match=r"the tensor mlp\.gain in TensorRT-LLM"):
            rank_layout(DeployedWeights(Weights(checkpoint)), Parallel(), 0)
