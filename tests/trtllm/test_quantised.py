"""Quantised TensorRT-LLM networks on the double: the arithmetic is the one meant; fp8's scales need no calibration."""

import numpy as np
import pytest
import torch

from export.quantize import FLOAT8_LARGEST
from export.trtllm.fp8 import activation_scale
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights
from tests.conftest import GOLDEN, Golden
from tests.doubles.reference import Reference
from tests.doubles.tensorrt_llm_double import layers
from tests.trtllm.serving import Engine, converted


def rms(error):
    return float(np.sqrt(np.mean(error**2)))


def run(engine, ids):
    engine.lengths = [0] * engine.slots
    return np.stack([engine.step([(row, text, True)])[0] for row, text in enumerate(ids)])


def dequantised(precision):
    """What the double's loader (int8, int4) or the converter (fp8) leaves of a canonical matrix; q, k and v share fp8's scale."""

    def replace(weights):
        def one(name, matrix):
            if name in ("embed", "head.weight"):
                return matrix.astype(np.float16).astype(np.float32)
            if precision == "fp8":
                parts = [name] if ".attn." not in name or name.endswith("o.weight") else [
                    f"{name.rsplit('.', 2)[0]}.{part}.weight" for part in "qkv"
                ]  # fmt: skip
                scale = max(float(np.abs(weights.get(part)).max()) for part in parts) / FLOAT8_LARGEST
                codes = torch.from_numpy(matrix / np.float32(scale)).to(torch.float8_e4m3fn)
                return codes.float().numpy() * np.float32(scale)
            codes, scale = layers.weight_only_codes(torch.from_numpy(matrix).half(), int(precision[3:]))
            return (codes * scale.float()[:, None]).numpy()

        return one

    return replace


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weight_only_networks_multiply_by_the_dequantised_weights(precision, tmp_path):
    """Their checkpoint holds plain weights; TensorRT-LLM's loader quantises them, as the double's does."""
    case = Golden("gqa")
    (tmp_path / "plain").mkdir()
    noise = rms(run(Engine(converted(case.folder, tmp_path / "plain", precision="fp16")), case.ids) - case.logits)
    got = run(Engine(converted(case.folder, tmp_path, precision=precision)), case.ids)
    with open_checkpoint(case.folder) as checkpoint:
        weights = DeployedWeights(Weights(checkpoint), arithmetic="float16")
        exact, _ = Reference(weights, replace=dequantised(precision)(weights))(case.ids)
    assert rms(got - exact) <= 4 * noise
    assert rms(exact - case.logits) > 4 * noise  # the format does round: the check above is not empty


def test_fp8_computes_with_the_dequantised_weights_and_little_else(tmp_path):
    """Rounding of activations comes on top of the weights': the two together are of the weights' own size."""
    case = Golden("gqa")
    got = run(Engine(converted(case.folder, tmp_path, precision="fp8")), case.ids)
    with open_checkpoint(case.folder) as checkpoint:
        weights = DeployedWeights(Weights(checkpoint), arithmetic="float16")
        exact, _ = Reference(weights, replace=dequantised("fp8")(weights))(case.ids)
    by_weights, all_of_it = rms(exact - case.logits), rms(got - case.logits)
    assert 0.2 * by_weights < all_of_it < 3 * by_weights


def test_scales_from_bounds_lose_hardly_more_than_calibrated_ones(tmp_path, monkeypatch):
    """Calibrated: the largest value each product's input takes on the very text that is measured."""
    case = Golden("gqa")
    engine = Engine(converted(case.folder, tmp_path, precision="fp8"))
    ours = rms(run(engine, case.ids) - case.logits)
    seen, product = {}, layers._FP8.product

    def watch(self, x):
        seen[self] = max(seen.get(self, 0.0), float(x.data.float().abs().max()))
        return product(self, x)

    monkeypatch.setattr(layers._FP8, "product", watch)
    run(engine, case.ids)
    assert len(seen) == 4 * 3
    for module, largest in seen.items():
        scale = module.activation_scaling_factor
        assert largest <= FLOAT8_LARGEST * float(scale.value.data)  # never saturated
        scale.value = torch.tensor([largest / FLOAT8_LARGEST])
    calibrated = rms(run(engine, case.ids) - case.logits)
    assert ours <= 1.25 * calibrated


@pytest.mark.parametrize("name", ["gqa", "llama3-rope-bias", "research-checkpoint"])
def test_no_input_exceeds_its_bound(name):
    """Whatever the hidden state: the worst unit vector of each row is tried."""
    with open_checkpoint(GOLDEN / name / ("ckpt.pt" if name.startswith("research") else "")) as checkpoint:
        weights = DeployedWeights(Weights(checkpoint))
        for prefix in ("layers.0", "layers.1"):
            for matrix, product in ((f"{prefix}.attn.v", f"{prefix}.attn.o"), (f"{prefix}.mlp.up", f"{prefix}.mlp.down")):
                rows = weights.get(f"{matrix}.weight").astype(np.float64)
                states = rows / np.linalg.norm(rows, axis=1, keepdims=True)
                values = np.einsum("ij,ij->i", rows, states)
                if weights.has(f"{matrix}.bias"):
                    values = values + np.abs(weights.get(f"{matrix}.bias"))
                if product.endswith("down"):
                    if weights.spec.gated:
                        continue  # both factors at their bounds at once need not occur
                    values = values**2
                bound = FLOAT8_LARGEST * activation_scale(weights, product)
                assert values.max() <= bound * (1 + 1e-6) and values.max() > 0.99 * bound
