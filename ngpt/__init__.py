"""nGPT for transformers: `from ngpt import NGPTConfig, NGPTModel, NGPTForCausalLM`.

Importing the package loads neither torch nor transformers: the classes are loaded when one of them is asked for. It also sees to
it that transformers' Auto classes know nGPT, whichever of the two packages is imported first (`ngpt.registration`).
The checkpoint readers (`ngpt.checkpoint`, `ngpt.spec`, `ngpt.weights`) work without transformers, and beside the
older one that TensorRT-LLM 1.2 pins.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ngpt.registration import check_installed, watch_imports

if TYPE_CHECKING:
    from ngpt.config import NGPTConfig
    from ngpt.model import NGPTForCausalLM, NGPTForSequenceClassification, NGPTForTokenClassification, NGPTModel

__version__ = "0.4.0"
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
    check_installed()
    return getattr(import_module("ngpt.config" if name == "NGPTConfig" else "ngpt.model"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


watch_imports()
