"""nGPT for transformers: `from ngpt import NGPTConfig, NGPTModel, NGPTForCausalLM`.

Importing the package registers the classes with AutoConfig, AutoModel and AutoModelForCausalLM where transformers 5 is
installed. The checkpoint readers (`ngpt.checkpoint`, `ngpt.spec`, `ngpt.weights`) work without it, and beside the older
transformers that TensorRT-LLM 1.2 pins.
"""

from importlib.util import find_spec

__version__ = "0.1.0"
__all__ = ["NGPTConfig", "NGPTForCausalLM", "NGPTModel", "__version__"]


def _has_transformers() -> bool:
    if find_spec("transformers") is None or find_spec("torch") is None:
        return False
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


if _has_transformers():
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from ngpt.config import NGPTConfig
    from ngpt.model import NGPTForCausalLM, NGPTModel

    AutoConfig.register("ngpt", NGPTConfig, exist_ok=True)
    AutoModel.register(NGPTConfig, NGPTModel, exist_ok=True)
    AutoModelForCausalLM.register(NGPTConfig, NGPTForCausalLM, exist_ok=True)
