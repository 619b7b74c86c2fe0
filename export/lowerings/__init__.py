"""The network's vocabulary (`base`) and a package for each runtime that implements it; TensorRT-LLM: `export.trtllm`."""
