"""For TensorRT-LLM's PyTorch runtime."""
