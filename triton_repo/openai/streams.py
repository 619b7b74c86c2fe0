"""Several answers at once as one stream of pieces, and what they have used."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_repo.openai.generation import Piece

Event = dict[str, Any]
"""A chunk of a streamed answer, as JSON."""


@dataclass
class Usage:
    """Tokens of a request: each of its prompts once, and what all its choices have said."""

    prompts: dict[int, int] = field(default_factory=dict)
    completion: int = 0

    def add(self, piece: Piece, prompt: int = 0) -> None:
        """The last piece of a choice, and the place of the prompt that it answers."""
        self.prompts[prompt] = piece.prompt_tokens
        self.completion += piece.completion_tokens

    @property
    def prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(self.prompts.values())

    def body(self) -> dict[str, int]:
        """As JSON."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


async def merged(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all, each with the place of its source, as they come. Left early, all are left; the first error ends all."""
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as only:
            async for piece in only:
                yield 0, piece
        return
    # Bounded, so that a client that reads slowly slows its answers down and not this process's memory up.
    ready: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(64)

    async def read(index: int, source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with contextlib.aclosing(source):
                async for piece in source:
                    await ready.put((index, piece))
            await ready.put((index, None))
        except Exception as error:
            await ready.put((index, error))

    tasks = [asyncio.create_task(read(index, source)) for index, source in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            index, found = await ready.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield index, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
