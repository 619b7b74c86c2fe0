"""The folder for `trtllm-serve --custom_module_dirs` (TensorRT-LLM 1.3): importing it registers nGPT.

The class lives in an installed package, so that worker processes can import it by name.
"""

from export.trtllm.modeling_ngpt import NGPTForCausalLM

__all__ = ["NGPTForCausalLM"]
