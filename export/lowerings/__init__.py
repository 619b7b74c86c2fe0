"""The vocabulary of the network (`base`), and a package for each runtime that implements it; TensorRT-LLM's is in `export.trtllm`."""
