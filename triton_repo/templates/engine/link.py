"""How the text model reaches the engine that the tokens model holds: a local stream socket, one connection a request.

Not through the server's own model-to-model calls: with many of them at once, the pip server's Python backend loses answers. The
address is an abstract Unix socket named after the server's process and the repository; a peer of another user is turned away.
A message is a length, a JSON header and the raw bytes of the arrays the header lists. Closing the connection cancels the request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.runtime import RequestHandle
from triton_repo.interface import NGPT as ENGINE
from triton_repo.templates.shared.python_backend import Arrays, Header

__all__ = ["ENGINE", "EngineLink", "EngineServer", "address"]
CUT: Header = {"error": "the engine ended before the answer did", "kind": "ClosedError"}
LENGTH = struct.Struct("<II")
LIMIT = 1 << 30


def address(model_folder: Path) -> str:
    """The engine's address for the models of one repository in one server."""
    place = hashlib.sha256(str(Path(model_folder).resolve().parents[1]).encode()).hexdigest()[:16]
    return f"\0ngpt-deploy-{os.getppid()}-{place}"


def send(connection: socket.socket, header: Header, arrays: Sequence[Any] = ()) -> None:
    """One message: a JSON header and float32 arrays."""
    arrays = [np.ascontiguousarray(array, dtype=np.float32) for array in arrays]
    data = json.dumps(header | {"shapes": [array.shape for array in arrays]}).encode()
    body = b"".join(array.tobytes() for array in arrays)
    connection.sendall(LENGTH.pack(len(data), len(body)) + data + body)


def receive(connection: socket.socket) -> tuple[Header, Arrays] | None:
    """The next message as (header, arrays), or None when the other side has closed."""
    start = _exactly(connection, LENGTH.size)
    if start is None:
        return None
    size, rest = LENGTH.unpack(start)
    if size > LIMIT or rest > LIMIT:
        raise ConnectionError(f"expected a message of at most {LIMIT} bytes, found {size + rest}")
    data, body = _exactly(connection, size), _exactly(connection, rest)
    if data is None or body is None:
        return None
    header, arrays, place = json.loads(data), [], 0
    for shape in header["shapes"]:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(body, np.float32, count, place).reshape(shape))
        place += 4 * count
    return header, arrays


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class EngineServer:
    """Answers connections with ``submit(prompt, sampling) -> handle`` of the scheduler, until ``stop``."""

    def __init__(
        self, name: str, submit: Callable[[Sequence[int], dict[str, Any]], RequestHandle], done: Callable[[RequestHandle], None]
    ) -> None:
        """``done(handle)`` is called after the last message of each request."""
        self._submit, self._done = submit, done
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(name)
        self._listener.listen(1024)
        threading.Thread(target=self._accept, name="engine-link", daemon=True).start()

    def stop(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            user = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            if user != os.getuid():
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                message = receive(connection)
                if message is None:
                    return
                try:
                    handle = self._submit(message[0]["prompt"], message[0]["sampling"])
                except Exception as error:
                    send(connection, {"error": str(error), "kind": type(error).__name__})
                    return
                threading.Thread(target=_cancel_on_close, args=(connection, handle), daemon=True).start()
                self._answer(connection, handle)
                self._done(handle)
            except OSError:
                return  # the client has gone, and its request with it

    @staticmethod
    def _answer(connection: socket.socket, handle: RequestHandle) -> None:
        try:
            for event in handle:
                if event.has_token:
                    logits = [] if event.logits is None else [event.logits]
                    last = event.finish_reason is not None
                    send(connection, {"token": event.token, "logprob": event.logprob, "last": last}, logits)
        except OSError:
            handle.cancel()
            raise
        except Exception as error:
            send(connection, {"error": str(error), "kind": type(error).__name__})
            return
        times = {f"{moment}_time_ns": getattr(handle.times, f"{moment}_ns") for moment in MOMENTS}
        send(
            connection,
            {"end": handle.finish_reason, "times": times},
            [] if handle.context_logits is None else [handle.context_logits],
        )


MOMENTS = ("arrival", "first_scheduled", "first_token", "last_token")


def _cancel_on_close(connection: socket.socket, handle: RequestHandle) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)
    handle.cancel()


class EngineLink:
    """One request to the engine. Iterating yields (header, arrays); the last header has "end" or "error"."""

    def __init__(self, name: str, prompt: Sequence[int], sampling: dict[str, Any], patience: float = 20.0) -> None:
        """Raises ConnectionError when the tokens model does not answer within ``patience`` seconds."""
        self.given_up = False
        self._connection = _connect(name, patience)
        send(self._connection, {"prompt": prompt, "sampling": sampling})

    def cancel(self) -> None:
        """Give the request up: its slot is free at the engine's next step. May be called from any thread, and again."""
        self.given_up = True
        with contextlib.suppress(OSError):
            # Only our side: what the engine says at the end still arrives.
            self._connection.shutdown(socket.SHUT_WR)

    def __iter__(self) -> Iterator[tuple[Header, Arrays]]:
        with self._connection:
            while (message := receive(self._connection)) is not None:
                yield message
                if "token" not in message[0]:
                    return
        # Every answer has an end, a cancelled one too: this one was cut by the end of the model that holds the engine.
        yield CUT, []


def _connect(name: str, patience: float) -> socket.socket:
    deadline = time.monotonic() + patience
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(name)
            return connection
        except OSError as error:
            connection.close()
            if time.monotonic() > deadline:
                raise ConnectionError("the model tensorrt_llm, which holds the engine, is not loaded in this server") from error
            time.sleep(0.05)
