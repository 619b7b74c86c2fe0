"""Puts a double's modules in the place of a library's, and takes everything back at the end."""

import sys
from contextlib import contextmanager


@contextmanager
def swapped(modules, clients):
    """`modules` (name -> module) in sys.modules; `clients`, which import them, are imported anew, and dropped at the end."""
    before = {name: sys.modules.get(name) for name in (*modules, *clients)}
    for name in clients:
        sys.modules.pop(name, None)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, old in before.items():
            sys.modules.pop(name, None)
            if old is not None:
                sys.modules[name] = old
