"""For TensorRT-LLM's engine backend."""
