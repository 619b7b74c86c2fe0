"""The two fused normalization kernels, their compilation to PTX, and their registration as TensorRT plugins."""
