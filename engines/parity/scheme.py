"""How an engine of a named precision computes, as far as the parity check needs to know: arithmetic and quantisation."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from engines.parity.quantized import WHOLE_ROW, Quantization
from export.lowerings.tensorrt_layers import ARITHMETIC, INT4_BLOCK
from export.quantize import quantize, quantize_dequantize, quantize_fp8
from ngpt.errors import TargetError

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_BITS = {"int8": 8, "int4": 4}


def scheme(precision: str, runtime: str, block_size: int) -> tuple[str, Quantization | None]:
    """(dtype of the arithmetic outside quantised products, quantisation or None) of engines of a runtime in a precision.

    ONNX Runtime's quantised products round their inputs to int8 and give float32; TensorRT's dequantise the weight and compute
    in float16. Both keep the head at 8 bits, since its rounding goes straight into the logits, and the embedding table in
    float16. Raises TargetError for a precision that the runtime does not have.
    """
    on_onnx = runtime == "onnxruntime"
    known = {**dict.fromkeys(_BITS, "fp32"), **{p: p for p in _DTYPES}} if on_onnx else ARITHMETIC
    if precision not in known:
        raise TargetError(f"precision of the parity check for {runtime}", expected=", ".join(known), found=repr(precision))
    dtype = _DTYPES[known[precision]]
    if precision in _DTYPES:
        return dtype, None
    if on_onnx:
        return dtype, Quantization(_BITS[precision], block_size, quantize_dequantize, head_bits=8, narrow_embedding=True)
    plain = Quantization(8, WHOLE_ROW, _narrow_scales, int8_activations=False, narrow_embedding=True)
    if precision == "fp8":
        return dtype, dataclasses.replace(plain, quantize_dequantize=_through_float8, float8=True)
    if precision == "int4":
        return dtype, dataclasses.replace(plain, bits=4, block_size=INT4_BLOCK, head_bits=8, head_block=WHOLE_ROW)
    return dtype, plain


def _narrow_scales(weight: NDArray[np.float32], bits: int, block_size: int) -> NDArray[np.float32]:
    """As TensorRT's network holds it: the scales are stored in float16."""
    columns = weight.shape[1]
    codes = quantize(weight, bits, block_size or columns + columns % 2)
    return dataclasses.replace(codes, scales=codes.scales.astype(np.float16).astype(np.float32)).dequantize()


def _through_float8(weight: NDArray[np.float32], bits: int, block_size: int) -> NDArray[np.float32]:
    codes, scales = quantize_fp8(weight)
    restored: NDArray[np.float32] = codes.astype(np.float32) * scales.astype(np.float16).astype(np.float32)[:, None]
    return restored
