"""Engines: build them for a target (`engines.build`), check them (`engines.parity`), run them (`engines.runtime`).

`load_engine` needs numpy, tokenizers and the engine's own runtime library, nothing else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.build import build_engine
    from engines.runtime.engine import load_engine

__all__ = ["build_engine", "load_engine"]


def __getattr__(name: str) -> Any:
    """The functions, loaded when one is asked for: building needs PyTorch, running does not."""
    if name == "build_engine":
        from engines.build import build_engine

        return build_engine
    if name == "load_engine":
        from engines.runtime.engine import load_engine

        return load_engine
    raise AttributeError(f"module 'engines' has no attribute {name!r}")
