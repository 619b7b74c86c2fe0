"""The streamed reference is the PyTorch model: equal to the bit to `NGPTForCausalLM`, whole in memory, in every type."""

import json
import shutil

import numpy as np
import pytest
import torch

from engines.parity.quantized import Quantization, quantization_of, round_to_int8
from engines.parity.reference import Variant, run_reference
from engines.parity.scratch import Scratch
from engines.parity.weights import PerturbedWeights, QuantizedWeights, changed, folded_factors
from export.precision import ONNX_RUNTIME, TENSORRT
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights
from tests.conftest import TINY
from tests.doubles.torch_reference import TorchReference, loadable_folder, put_quantized_weights, quantize_activations
from tests.ngpt.making import GOLDEN

FOLDERS = ["gqa", "llama3-rope-bias", "dead-mlp", "research-checkpoint", "research-train-py"]
KINDS = [("float64", "eager"), ("float32", "eager"), ("float32", "sdpa"), ("bfloat16", "eager"), ("float16", "eager")]


def some_tokens(checkpoint):
    random = np.random.default_rng(3)
    return [tuple(map(int, random.integers(0, checkpoint.spec.vocab_size, length))) for length in (1, 7, 19)]


def place(name):
    folder = GOLDEN / name
    return folder / "ckpt.pt" if (folder / "ckpt.pt").exists() else folder


@pytest.mark.parametrize("name", FOLDERS)
def test_every_type_and_kernel_is_the_whole_model_to_the_bit(name):
    variants = [Variant(f"{precision} {kernel}", precision, kernel, tapped=True) for precision, kernel in KINDS]
    seen = {variant.name: [{} for _ in range(3)] for variant in variants}

    def keep(index, values):
        for variant, taps in values.items():
            seen[variant][index].update(taps)

    with open_checkpoint(place(name)) as checkpoint, loadable_folder(checkpoint) as folder:
        sequences = some_tokens(checkpoint)
        outputs = run_reference(checkpoint, sequences, variants, on_taps=keep)
        for variant, (precision, kernel) in zip(variants, KINDS, strict=True):
            whole = TorchReference(folder, precision, attention=kernel)
            for index, tokens in enumerate(sequences):
                logits, taps = whole.run(tokens)
                found = outputs[variant.name][index]
                assert found.dtype == logits.dtype
                np.testing.assert_array_equal(found, logits)
                for tap, value in taps.items():
                    np.testing.assert_array_equal(seen[variant.name][index][tap], value)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_and_activations_are_those_of_the_whole_model(precision):
    scheme = quantization_of(ONNX_RUNTIME[precision])
    change = QuantizedWeights(scheme)
    variants = [
        Variant("weights", "float64", change=change),
        Variant("both", "float32", change=change, round_input=lambda x: round_to_int8(x, scheme.activation_block)),
    ]
    with open_checkpoint(TINY) as checkpoint:
        sequences = some_tokens(checkpoint)
        outputs = run_reference(checkpoint, sequences, variants)
    for variant in variants:
        whole = TorchReference(TINY, variant.precision)
        put_quantized_weights(whole.model, scheme)
        if variant.round_input is not None:
            quantize_activations(whole.model, scheme)
        for tokens, found in zip(sequences, outputs[variant.name], strict=True):
            np.testing.assert_array_equal(found, whole.run(tokens)[0])
    assert len(change.audit.matrices) == 37 and 0.9 < change.audit.worst_step <= 1.0


def test_a_tied_head_is_quantised_and_the_table_is_not(tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(TINY, folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    scheme = quantization_of(ONNX_RUNTIME["int8"])
    with open_checkpoint(folder) as checkpoint:
        tokens = some_tokens(checkpoint)[1]
        found = run_reference(checkpoint, [tokens], [Variant("q", "float64", change=QuantizedWeights(scheme))])["q"][0]
    whole = TorchReference(folder, "float64")
    put_quantized_weights(whole.model, scheme)
    np.testing.assert_array_equal(found, whole.run(tokens)[0])


def test_large_arrays_lie_in_files_and_small_ones_do_not(tmp_path):
    scratch = Scratch(tmp_path)
    assert isinstance(scratch.array((1 << 21, 2), np.float32), np.memmap) and len(list(tmp_path.iterdir())) == 1
    assert not isinstance(scratch.array((8,), np.float32), np.memmap)
    large = np.arange(1 << 22, dtype=np.float32)
    kept = scratch.kept(large)
    assert isinstance(kept, np.memmap) and (kept == large).all() and scratch.kept(large[:4]).base is large
    assert not isinstance(Scratch().array((1 << 21, 2), np.float32), np.memmap)


def test_blocks_of_rows_do_not_show(monkeypatch):
    """However a matrix is cut into rows, the result is the same; a perturbation is drawn per block, and by seed."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    scheme = quantization_of(ONNX_RUNTIME["int4"])
    whole, change = QuantizedWeights(scheme), QuantizedWeights(scheme)
    expected = changed("model.layers.0.mlp.up_proj.weight", weight, whole)
    monkeypatch.setattr("engines.parity.weights._AT_ONCE", 96 * 5)
    found = changed("model.layers.0.mlp.up_proj.weight", weight, change)
    assert torch.equal(expected, found)
    assert whole.audit.worst_step == change.audit.worst_step
    assert whole.audit.worst_rms == pytest.approx(change.audit.worst_rms, rel=1e-5)  # summed in float32
    first, again, other = (changed("lm_head.weight", weight, PerturbedWeights(scheme, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    plain = changed("model.layers.0.self_attn.sqk.weight", weight, change)
    assert plain is weight, "what is not quantised is not copied"


@pytest.mark.parametrize("name", ["gqa", "research-checkpoint"])
def test_rows_are_rounded_as_the_engine_rounds_them_with_the_scales_that_are_in_them(name):
    """TensorRT's int4 has float16 scales: rounding a bare row gives other weights than rounding it times suv * sqrt(E)."""
    precision = TENSORRT["int4"]
    scheme = quantization_of(precision)
    modules = {"up": "model.layers.0.mlp.up_proj", "down": "model.layers.0.mlp.down_proj", "gate": "model.layers.0.mlp.gate_proj"}
    with open_checkpoint(place(name)) as checkpoint:
        factors = folded_factors(checkpoint, precision.arithmetic)
        change = QuantizedWeights(scheme, factors)
        deployed = DeployedWeights(Weights(checkpoint), arithmetic=precision.arithmetic)
        for canonical in ("layers.0.mlp.up.weight", "layers.0.mlp.gate.weight", "layers.0.mlp.down.weight", "head.weight"):
            if not deployed.has(canonical):
                continue
            module = "lm_head" if canonical == "head.weight" else modules[canonical.split(".")[3]]
            before = checkpoint.get(f"{module}.weight").float().numpy()[3:40]
            by = factors(module)
            by = np.ones(1) if by is None else by[3:40, None]
            engine = precision.format_of(canonical).round_trip(deployed.get(canonical))[3:40]
            np.testing.assert_allclose(change.rows(module, 3, before) * by, engine, rtol=2e-6, atol=1e-9)
            if len(by) > 1:  # without them it is other weights
                assert np.abs(QuantizedWeights(scheme).rows(module, 3, before) * by - engine).max() > 1e-4


def test_a_perturbation_is_half_a_step_either_side():
    scheme = Quantization(8, 32, lambda _name, matrix: matrix)
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    moved = changed("lm_head.weight", weight, PerturbedWeights(scheme, 0)).numpy()
    blocks, step = scheme.blocks_and_step("lm_head", weight.numpy())
    errors = (scheme.blocks("lm_head", moved) - blocks) / step
    assert (
        0.49 < np.abs(errors).max() <= 0.5001 and abs(errors.mean()) < 0.01 and errors.std() == pytest.approx(12**-0.5, rel=0.02)
    )
