"""nGPT for transformers: `from ngpt import NGPTConfig, NGPTModel, NGPTForCausalLM`.

Importing the package loads neither torch nor transformers: the classes are loaded when one of them is asked for. It also sees to
it that transformers' Auto classes know nGPT, whichever of the two packages is imported first (`ngpt.registration`). The checkpoint
readers (`ngpt.checkpoint`, `ngpt.spec`, `ngpt.weights`) work without transformers, and beside the older one that TensorRT-LLM 1.2 pins.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from ngpt.config import NGPTConfig
    from ngpt.model import NGPTForCausalLM, NGPTForSequenceClassification, NGPTForTokenClassification, NGPTModel

__version__ = "0.1.0"
__all__ = [
    "NGPTConfig",
    "NGPTForCausalLM",
    "NGPTForSequenceClassification",
    "NGPTForTokenClassification",
    "NGPTModel",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """The class of that name, loaded now. Raises MissingPackageError where torch or a transformers that fits is missing."""
    if name not in __all__:
        raise AttributeError(f"module 'ngpt' has no attribute {name!r}")
    from ngpt.registration import check_installed

    check_installed()
    return getattr(import_module("ngpt.config" if name == "NGPTConfig" else "ngpt.model"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The hooks are named by text, so that this module stays light. Our own modules are in the list because each pair may be loaded in either
# order, and importing ngpt.model loads transformers' Auto classes halfway.
for _module in ("transformers.models.auto.configuration_auto", "ngpt.config"):
    register_post_import_hook("ngpt.registration:register_config", _module)
for _module in ("transformers.models.auto.modeling_auto", "ngpt.model"):
    register_post_import_hook("ngpt.registration:register_models", _module)
