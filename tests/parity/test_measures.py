"""The measures behind the gate, against values known in closed form."""

import ml_dtypes
import numpy as np
import pytest

from engines.parity.compare import distance
from engines.parity.quantized import Quantization, WeightAudit, audit_weight, quantization_of, round_to_int8
from engines.parity.taps import angle, tap_distance
from export.precision import ONNX_RUNTIME, TENSORRT, Format


@pytest.mark.parametrize("theta", [1e-12, 1e-7, 0.3, 2.0, np.pi])
def test_angle_is_accurate_from_tiny_to_opposite(theta):
    a = np.array([[1.0, 0.0], [3.0, 0.0]])
    b = np.array([[np.cos(theta), np.sin(theta)], [0.5 * np.cos(theta), 0.5 * np.sin(theta)]])
    np.testing.assert_allclose(angle(a, b), theta, rtol=1e-9)


def test_kl_is_that_of_the_reference_to_the_run():
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    d = distance(np.log(p), np.log(q), (0,))
    assert d.kl[0] == pytest.approx(0.25 * np.log(2))
    assert not d.top1[0] and d.margin[0] == pytest.approx(np.log(2))


def test_sqrt_kl_is_linear_in_the_error():
    random = np.random.default_rng(0)
    a, e = random.normal(size=(4, 50)), random.normal(size=(4, 50))
    small, large = (np.sqrt(distance(a, a + s * e, (0,) * 4).kl) for s in (1e-5, 1e-3))
    np.testing.assert_allclose(large / small, 100, rtol=5e-3)


def test_nll_is_of_the_next_token():
    logits = np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]))
    before, after = distance(logits, logits, (0, 1, 0)).nll
    np.testing.assert_allclose(before, -np.log([0.1, 0.2]))
    np.testing.assert_array_equal(before, after)


def test_a_nan_is_not_finite():
    logits = np.zeros((1, 3))
    assert not distance(logits, np.array([[0.0, np.nan, 0.0]]), (0,)).finite
    taps = {"embed": tap_distance("embed", np.ones((1, 2)), np.full((1, 2), np.inf))}
    assert not distance(logits, logits, (0,), taps).finite


@pytest.mark.parametrize("bits", [4, 8])
def test_audit_measures_in_quantisation_steps(bits):
    before = np.random.default_rng(1).uniform(-1, 1, (8, 64)).astype(np.float32)
    before[:, ::32] = 1.0
    step = 2 / (2**bits - 1)
    audit, scheme = WeightAudit(), Quantization(bits, 32, lambda *_: before)
    audit.add("exact", audit_weight("exact", before, np.round(before / step) * step, scheme))
    assert 0.4 < audit.worst_step <= 0.501 and audit.worst_rms == pytest.approx(0.29, abs=0.03)
    audit.add("off", audit_weight("off", before[:3], before[:3], scheme))
    audit.add("off", audit_weight("off", before[3:], before[3:] + 3 * step, scheme))
    assert audit.worst_name == "off" and audit.worst_step == pytest.approx(3, rel=1e-3)


def test_audit_notices_a_zero_block_that_comes_back_nonzero():
    audit, zero = WeightAudit(), np.zeros((2, 32), np.float32)
    audit.add("zero", audit_weight("zero", zero, zero + 1e-6, Quantization(4, 32, lambda *_: zero)))
    assert audit.worst_step == np.inf


def test_int8_rounding_pads_and_keeps_zero_blocks():
    import torch

    x = torch.cat([torch.zeros(32), torch.linspace(-1, 1, 18)])[None]
    y = round_to_int8(x, 32)
    assert y.shape == x.shape and torch.equal(y[:, :32], x[:, :32])
    assert 0 < float((y - x).abs().max()) <= 0.5 / 127 + 1e-7


def test_the_audit_knows_float8s_step():
    """e4m3 rounds within half a step of its own; e5m2, one bit narrower, passes for a rounding twice as coarse."""
    quantization = quantization_of(TENSORRT["fp8"])
    before = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    right, coarse = WeightAudit(), WeightAudit()
    right.add("w", audit_weight("w", before, quantization.round_trip("w", before), quantization))
    unit = np.abs(before).max(axis=1, keepdims=True) / 448
    narrow = (before / unit).astype(ml_dtypes.float8_e5m2).astype(np.float32) * unit
    coarse.add("w", audit_weight("w", before, narrow, quantization))
    assert 0.4 < right.worst_step <= 0.51 and 0.25 < right.worst_rms < 0.31  # a little beyond half: the scale itself is float16
    assert 0.5 < coarse.worst_rms < 0.62


def test_activations_are_rounded_in_blocks_of_their_own():
    """Not in those of the weights: the two may differ."""
    import dataclasses

    import torch

    precision = dataclasses.replace(ONNX_RUNTIME["int8"], activations=Format("int8", 16))
    quantization = quantization_of(precision)
    assert (quantization.block_size, quantization.activation_block) == (32, 16)
    x = torch.cat([torch.linspace(-1, 1, 16), torch.linspace(-0.01, 0.01, 16)])[None]
    assert not torch.equal(round_to_int8(x, 16), round_to_int8(x, 32))
    assert quantization_of(ONNX_RUNTIME["fp32"]) is None and quantization_of(TENSORRT["int8"]).activation_block is None


def test_where_the_length_counts_a_longer_value_is_another_one():
    x = np.random.default_rng(0).standard_normal((3, 8))
    assert (tap_distance("layers.0.mlp.act", x, 2 * x) == 0).all()
    np.testing.assert_allclose(tap_distance("layers.0.attn.q_scaled", x, 2 * x), 1)
    nothing = np.zeros((2, 4))
    assert (tap_distance("layers.0.mlp.act", nothing, nothing) == 0).all()
    np.testing.assert_allclose(tap_distance("layers.0.mlp.act", nothing, nothing + 1), np.pi / 2)
    assert (tap_distance("layers.0.attn.v", nothing, nothing) == 0).all()
    assert np.isinf(tap_distance("layers.0.attn.v", nothing, nothing + 1)).all()
    assert np.isnan(tap_distance("layers.0.attn.v", x, x * np.nan)).all() and np.isnan(tap_distance("embed", x, x * np.nan)).all()
