"""What a server that is started here has to know of this machine: its free ports, and which of its processes have ended."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
import urllib.request
from pathlib import Path

from ngpt.errors import ServerError

HOST = "127.0.0.1"


def dead_model(server: int) -> str:
    """What has died: a child that the server has not noticed for a second, for unloading a model ends one, too. Empty: none."""
    dead = _ended_children(server)
    if dead:
        time.sleep(1.0)
        dead &= _ended_children(server)
    return f"a model's process ({min(dead)})" if dead else ""


def _ended_children(parent: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid ...": the name may hold anything.
            state, ppid = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state == "Z" and int(ppid) == parent:
                found.add(int(stat.parent.name))
    return found


def free_ports() -> tuple[int, int, int]:
    """Three different free TCP ports (all bound at once, so that they differ)."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_STREAM) for _ in range(3)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        first, second, third = (int(each.getsockname()[1]) for each in sockets)
        return first, second, third
    finally:
        for each in sockets:
            each.close()


def check_port(port: int) -> None:
    """Raise ServerError where nothing can listen on the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was closed a moment ago is free
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(
                f"port {port} cannot be had on {HOST}",
                expected="a free port",
                found=error.strerror or str(error),
                remedy="stop what listens there, or choose another (0: any that is free)",
            ) from error


def http_ok(url: str) -> bool:
    """Whether a GET is answered by 200."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):  # URLError is an OSError; the other is what a port says that speaks no HTTP
        return False
