"""Templates are rendered in a process of their own, which may take only so long and so much memory.

A template comes with a checkpoint, and a loop in it can be as long as somebody likes. In the frontend's own process it would hold
up every stream; this one is ended and started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from triton_repo.openai.chat_template import ChatTemplate, TemplateError

MAX_SECONDS = 10.0
"""Of one prompt. Public templates take a thousandth of a second for a conversation."""
MAX_MEMORY = 2 << 30  # bytes of address space
_SIZE = 8  # bytes that say how long a message is
_CODE = "from triton_repo.openai.rendering import work; work()"


class Renderer:
    """Renders prompts, one at a time, in a process that begins with `start` or the first of them.

    templates: by the name of their model.
    """

    def __init__(self, templates: Mapping[str, ChatTemplate], *, max_seconds: float = MAX_SECONDS) -> None:
        self._setup = {name: template.description() for name, template in templates.items()}
        self._max_seconds = max_seconds
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def render(self, model: str, **request: Any) -> str:
        """The prompt, by the model's template; the rest as for `ChatTemplate.render`, all of it JSON values.

        Raises TemplateError, also for what takes too long.
        """
        async with self._turn:
            done = False
            try:
                process = await self._running()
                _send(process, {"model": model, "request": request})
                answer = await asyncio.wait_for(_receive(process), self._max_seconds)
                done = True
            except TimeoutError:
                raise TemplateError(
                    f"the chat template takes more than {self._max_seconds:g} seconds for these messages"
                ) from None
            except (OSError, EOFError):
                raise TemplateError("the chat template takes too much memory for these messages") from None
            finally:
                if not done:  # also when the client has left: an answer that nobody reads would be the next one's
                    await self.close()
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        return str(answer["text"])

    async def start(self) -> None:
        """Begin the process now, so that the first request need not wait for it."""
        async with self._turn:
            await self._running()

    async def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _CODE,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment,
            )
            _send(self._process, {"templates": self._setup})
            await asyncio.wait_for(_receive(self._process), 60.0)  # starting is nobody's fault
        return self._process


def _send(process: asyncio.subprocess.Process, message: Any) -> None:
    assert process.stdin is not None
    data = json.dumps(message).encode("ascii")
    process.stdin.write(len(data).to_bytes(_SIZE, "big") + data)


async def _receive(process: asyncio.subprocess.Process) -> Any:
    assert process.stdin is not None and process.stdout is not None
    await process.stdin.drain()
    size = int.from_bytes(await process.stdout.readexactly(_SIZE), "big")
    return json.loads(await process.stdout.readexactly(size))


def work() -> None:
    """The process itself: messages on standard input, answers on standard output, until the former ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    setup = _read(source)
    templates = {name: ChatTemplate(**each) for name, each in (setup or {"templates": {}})["templates"].items()}
    answer: dict[str, str] = {}
    while True:
        data = json.dumps(answer).encode("ascii")
        sink.write(len(data).to_bytes(_SIZE, "big") + data)
        sink.flush()
        asked = _read(source)
        if asked is None:
            return
        try:
            answer = {"text": templates[asked["model"]].render(**asked["request"])}
        except TemplateError as error:
            answer = {"error": str(error)}


def _read(source: BinaryIO) -> Any:
    head = source.read(_SIZE)
    return json.loads(source.read(int.from_bytes(head, "big"))) if len(head) == _SIZE else None
