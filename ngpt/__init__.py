"""nGPT for transformers: `from ngpt import NGPTConfig, NGPTModel, NGPTForCausalLM`.

Importing the package registers the classes with AutoConfig, AutoModel and AutoModelForCausalLM where transformers is
installed. The checkpoint readers (`ngpt.checkpoint`, `ngpt.spec`, `ngpt.weights`) work without transformers.
"""

from importlib.util import find_spec

__version__ = "0.1.0"
__all__ = ["NGPTConfig", "NGPTForCausalLM", "NGPTModel", "__version__"]

if find_spec("transformers") is not None and find_spec("torch") is not None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from ngpt.config import NGPTConfig
    from ngpt.model import NGPTForCausalLM, NGPTModel

    AutoConfig.register("ngpt", NGPTConfig, exist_ok=True)
    AutoModel.register(NGPTConfig, NGPTModel, exist_ok=True)
    AutoModelForCausalLM.register(NGPTConfig, NGPTForCausalLM, exist_ok=True)
