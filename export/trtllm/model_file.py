"""What `trtllm-build --model_cls_file` loads, as a module called `models`.

The class itself lives in a package, so that worker processes (`--workers`) can unpickle it by name.
"""

from export.trtllm.model import NGPTForCausalLM

__all__ = ["NGPTForCausalLM"]
