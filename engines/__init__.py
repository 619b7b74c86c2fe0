"""Engines: build them for a target (`engines.build`), check them (`engines.parity`), run them (`engines.runtime`).

`load_engine` needs numpy, tokenizers and the engine's own runtime library, nothing else.
"""

from typing import Any

__all__ = ["load_engine"]


def load_engine(path: Any, **options: Any) -> Any:
    """Open an engine folder after checking its manifest; see `engines.runtime.engine.load_engine` for the options."""
    from engines.runtime.engine import load_engine as load

    return load(path, **options)
