"""Package engines as Triton model repositories, serve them on this machine, and talk to them.

from triton_repo.package import package_engine
from triton_repo.server import TritonServer
from triton_repo.client import stream_text
"""
