"""Making transformers' Auto classes know nGPT, at the moment when they are loaded and not before.

`ngpt/__init__.py` has both functions called after transformers' module of Auto classes or ours has been imported, whichever happens
first. Registering twice is harmless.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

from ngpt.errors import MissingPackageError

OLDEST_TRANSFORMERS = (5, 4)
"""Its base class of configurations is the first that is a dataclass. `make matrix` runs the tests with this version and the newest."""


def check_installed() -> None:
    """Raise MissingPackageError, naming what to install, unless torch and a transformers of 5.4 or later are installed."""
    wanted = "transformers>=" + ".".join(map(str, OLDEST_TRANSFORMERS))
    remedy = f"pip install torch '{wanted},<6' (ngpt-deploy's extra 'torch')"
    for package in ("torch", "transformers"):
        if not _installed(package):
            raise MissingPackageError(f"nGPT's PyTorch classes need {package}", found="it is not installed", remedy=remedy)
    if not _new_enough():
        raise MissingPackageError(
            "nGPT's PyTorch classes need another transformers", expected=wanted.removeprefix("transformers"),
            found=sys.modules["transformers"].__version__, remedy=remedy,
        )  # fmt: skip


def register_config(_module: Any) -> None:
    """Called with the module that was just imported: transformers' `configuration_auto`, or `ngpt.config`."""
    if _usable("ngpt.config", "NGPTConfig"):
        from transformers import AutoConfig

        from ngpt.config import NGPTConfig

        AutoConfig.register("ngpt", NGPTConfig, exist_ok=True)


def register_models(_module: Any) -> None:
    """Called with the module that was just imported: transformers' `modeling_auto`, or `ngpt.model`."""
    if _usable("ngpt.model", "NGPTForTokenClassification"):
        import transformers

        from ngpt import model
        from ngpt.config import NGPTConfig

        for auto, kind in (
            (transformers.AutoModel, model.NGPTModel),
            (transformers.AutoModelForCausalLM, model.NGPTForCausalLM),
            (transformers.AutoModelForSequenceClassification, model.NGPTForSequenceClassification),
            (transformers.AutoModelForTokenClassification, model.NGPTForTokenClassification),
        ):
            auto.register(NGPTConfig, kind, exist_ok=True)


def _usable(module: str, last: str) -> bool:
    """Whether our classes can be loaded: False beside a transformers that does not fit, which is left alone, and while our own
    module is still being imported (it has not got as far as `last`); this is called again when it is complete."""
    ours = sys.modules.get(module)
    return _installed("torch") and _new_enough() and (ours is None or hasattr(ours, last))


def _new_enough() -> bool:
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return (int(major), int(minor)) >= OLDEST_TRANSFORMERS


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return find_spec(package) is not None
