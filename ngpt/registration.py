"""Making transformers' Auto classes know nGPT as soon as they are loaded, so that importing `ngpt` need not load them.

`watch_imports` watches the import of transformers' modules of Auto classes, of ours, and of those that ours need:
either package may be imported first, and transformers loads its Auto classes while other modules of its own are only
halfway loaded. Whenever none of them is halfway, what is loaded is registered. Doing so twice is harmless.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType

from ngpt.errors import missing_package

OLDEST_TRANSFORMERS = (5, 4)
"""The first whose base class of configurations is a dataclass. `make matrix` runs the tests with it and the newest."""

_CONFIGS, _MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
_WATCHED = {_CONFIGS, _MODELS, "ngpt.config", "ngpt.layers", "ngpt.model"} | {
    f"transformers.{name}" for name in ("configuration_utils", "generation.utils", "modeling_layers", "modeling_utils")
}


def check_installed() -> None:
    """Raise MissingPackageError, naming what to install, unless torch and a transformers of 5.4 or later are installed."""
    for package in ("torch", "transformers"):
        if not _installed(package):
            raise missing_package(f"nGPT's PyTorch classes need {package}", "torch", found="it is not installed")
    if not _new_enough():
        found = f"transformers {sys.modules['transformers'].__version__}"
        raise missing_package("nGPT's PyTorch classes need another transformers", "torch", found=found)


def register() -> None:
    """Make transformers' Auto classes, as far as they are loaded, know ours. A transformers that does not fit is left alone."""
    if _CONFIGS in sys.modules and _installed("torch") and _new_enough():
        from transformers import AutoConfig

        from ngpt.config import NGPTConfig

        AutoConfig.register("ngpt", NGPTConfig, exist_ok=True)
        if _MODELS in sys.modules:
            _register_models(NGPTConfig)


def _register_models(config: type) -> None:
    import transformers

    from ngpt.model import NGPTForCausalLM, NGPTForSequenceClassification, NGPTForTokenClassification, NGPTModel

    for auto, kind in (
        (transformers.AutoModel, NGPTModel),
        (transformers.AutoModelForCausalLM, NGPTForCausalLM),
        (transformers.AutoModelForSequenceClassification, NGPTForSequenceClassification),
        (transformers.AutoModelForTokenClassification, NGPTForTokenClassification),
    ):
        auto.register(config, kind, exist_ok=True)


def watch_imports() -> None:
    """Register what is loaded already, and the rest when it is."""
    if not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
        register()


class _Watch(MetaPathFinder):
    """Finds the watched modules where Python would, and calls `register` when they have run."""

    def __init__(self) -> None:
        self.halfway: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in _WATCHED else None
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader, name)
        return spec

    def _watch(self, loader: Loader, name: str) -> None:
        """Replace the method of this one loader, so that the module keeps the loader it would have."""
        run = loader.exec_module

        def run_watched(module: ModuleType) -> None:
            if module.__name__ != name:  # some loaders serve several modules
                run(module)
                return
            self.halfway.add(name)
            try:
                run(module)
            finally:
                self.halfway.discard(name)
            if not self.halfway:
                register()

        loader.exec_module = run_watched  # type: ignore[method-assign]


def _new_enough() -> bool:
    import transformers

    major, minor = transformers.__version__.split(".")[:2]
    return (int(major), int(minor)) >= OLDEST_TRANSFORMERS


def _installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return find_spec(package) is not None
