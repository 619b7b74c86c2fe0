"""Formats of weights: error bounds from the step, odd widths, bytes as the arrays have them, spellings read back."""

import dataclasses

import numpy as np
import pytest

from export.precision import CODE_BITS, ONNX_RUNTIME, ROW, TENSORRT, TENSORRT_LLM, WHOLE, Format, Precision
from ngpt.errors import UnsupportedError

TABLES = {"onnxruntime": ONNX_RUNTIME, "tensorrt": TENSORRT, "tensorrt_llm": TENSORRT_LLM}
ALL = [(runtime, name) for runtime, table in TABLES.items() for name in table]
QUANTISED = [
    Format("int8", 32),
    Format("int4", 32),
    Format("int8", ROW, "float16"),
    Format("int4", ROW),
    Format("float8_e4m3", ROW),
]


def weights(rows=7, columns=96):
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("code", ["int4/32/float32", "int8/row/float32", "float8_e4m3/row/float32"])
def test_rows_of_almost_nothing_stay_almost_nothing(code):
    """A scale below the normal numbers has an inverse beyond float32. Rows of a head may be such: sz multiplies them."""
    weight = weights(rows=60) * np.float32(2.0) ** -np.arange(100, 160, dtype=np.float32)[:, None]
    weight[-1] = 0
    result = Format.parse(code).quantize(weight)
    assert np.isfinite(result.scales).all() and np.isfinite(result.dequantize()).all()
    assert (np.abs(result.dequantize() - weight) <= np.abs(weight).max(axis=1, keepdims=True)).all()
    assert (result.dequantize()[-1] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 64, 80, 100])
def test_error_is_within_half_a_step(bits, columns):
    weight = weights(columns=columns)
    result = Format(f"int{bits}", 32).quantize(weight)
    step = np.repeat(np.abs(result.scales), 32, axis=1)[:, :columns]
    # The far end of the range has one code less, so a value there may be off by a whole step.
    assert (np.abs(result.dequantize() - weight) <= step * 1.0001).all()
    inside = np.abs(weight) <= step * ((1 << (bits - 1)) - 1)
    assert (np.abs(result.dequantize() - weight)[inside] <= step[inside] * 0.5001).all()


def test_zero_blocks_stay_zero_and_the_largest_value_is_exact():
    weight = np.zeros((2, 64), np.float32)
    weight[1, 3] = -0.75
    for form in QUANTISED:
        back = form.round_trip(weight)
        assert (back[0] == 0).all() and back[1, 3] == pytest.approx(-0.75, rel=0 if form.scale == "float32" else 2**-11)


@pytest.mark.parametrize(
    ("code", "block"), [("int3", 32), ("int8", 8), ("int4", 33), ("int8", None), ("float8_e4m3", 32), ("float16", 32), ("", None)]
)
def test_formats_that_do_not_exist_are_refused(code, block):
    with pytest.raises(UnsupportedError, match="format"):
        Format(code, block)


def test_a_plain_format_and_one_scale_for_a_matrix_cannot_be_quantised_to():
    for form in (Format("float16"), Format("float8_e4m3", WHOLE)):
        with pytest.raises(UnsupportedError, match="format to quantise to"):
            form.quantize(weights())


@pytest.mark.parametrize("form", QUANTISED, ids=str)
@pytest.mark.parametrize("columns", [32, 96, 97])
def test_its_bytes_are_those_of_the_arrays(form, columns):
    stored = form.quantize(weights(columns=columns))
    scale = {"float32": 4, "float16": 2}[form.scale]
    assert form.bytes(7, columns) == stored.data.nbytes + stored.scales.size * scale
    assert stored.scales.shape == (7, 1 if form.block == ROW else -(-columns // 32))


def test_scales_are_numbers_of_their_type():
    scales = Format("int8", ROW, "float16").quantize(weights()).scales
    assert scales.dtype == np.float32 and (scales == scales.astype(np.float16)).all()
    assert (Format("int8", ROW).quantize(weights()).scales != scales).any()


def test_a_matrix_of_many_blocks_of_rows_is_quantised_as_one(monkeypatch):
    whole = {form: form.quantize(weights()) for form in QUANTISED}
    monkeypatch.setattr("export.quantize._AT_ONCE", 200)
    for form, want in whole.items():
        got = form.quantize(weights())
        np.testing.assert_array_equal(got.data, want.data)
        np.testing.assert_array_equal(got.scales, want.scales)


@pytest.mark.parametrize(("runtime", "name"), ALL)
def test_a_precision_is_read_back_from_what_a_manifest_says(runtime, name):
    precision = TABLES[runtime][name]
    found = Precision.from_description(name, precision.describe())
    assert dataclasses.replace(found, loader_quantises=precision.loader_quantises) == precision
    assert precision.quantised == (name not in ("fp32", "fp16", "bf16"))


@pytest.mark.parametrize(
    "change",
    [{"arithmetic": "int8"}, {"cache": "float64"}, {"head": "int8/31/float32"}, {"head": "int8/32"}, {"head": "int8/32/int8"},
     {"projections": "int8/row/float32/x"}, {"surprise": "1"}, {"embedding": ""}, {"head": "int8/" + "9" * 5000 + "/float32"}],
)  # fmt: skip
def test_a_description_that_means_nothing_is_refused(change):
    with pytest.raises(UnsupportedError) as refused:
        Precision.from_description("int8", ONNX_RUNTIME["int8"].describe() | change)
    assert len(str(refused.value)) < 1000
    with pytest.raises(UnsupportedError, match="description"):
        Precision.from_description("int8", {"arithmetic": "float32"})


def test_the_head_keeps_eight_bits_or_more_in_every_precision():
    for table in TABLES.values():
        for precision in table.values():
            assert precision.format_of("head").plain or CODE_BITS[precision.format_of("head.weight").code] == 8
            assert precision.format_of("embed").plain and precision.format_of("layers.0.mlp.up") == precision.projections
