"""The network as an ONNX graph: `portable` in standard operators, `fused` with ONNX Runtime's kernels. Needs onnx_ir."""

from export.lowerings.onnx.external import save_with_data
from export.lowerings.onnx.fused import OnnxRuntime
from export.lowerings.onnx.portable import OnnxPortable

__all__ = ["OnnxPortable", "OnnxRuntime", "save_with_data"]
