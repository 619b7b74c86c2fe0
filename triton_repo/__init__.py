"""Package engines as Triton model repositories, serve them on this machine, and talk to them.

from triton_repo import TritonServer, package_engine
from triton_repo.client import stream_text
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_repo.package import package_engine
    from triton_repo.server import TritonServer

__all__ = ["TritonServer", "package_engine"]


def __getattr__(name: str) -> Any:
    if name == "package_engine":
        from triton_repo.package import package_engine

        return package_engine
    if name == "TritonServer":
        from triton_repo.server import TritonServer

        return TritonServer
    raise AttributeError(f"module 'triton_repo' has no attribute {name!r}")
