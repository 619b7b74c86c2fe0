"""POST /v1/completions: a text, or token ids, and what follows."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from triton_repo.async_client import AsyncClient
from triton_repo.openai import guides
from triton_repo.openai.errors import ApiError
from triton_repo.openai.generation import Ask, Piece, generate, tensors
from triton_repo.openai.models import Model
from triton_repo.openai.probabilities import Probabilities
from triton_repo.openai.requests import MAX_CHOICES, CompletionRequest
from triton_repo.openai.streams import Event, Usage, merged

USUAL_TOKENS = 16
"""What OpenAI generates where a request does not say."""
MAX_LOGITS = 16 << 20
"""Numbers that the probabilities of one prompt may be made of: its tokens times the vocabulary, 64 MiB."""


class Completion:
    """One request to the endpoint: `events` as a stream, or `answer` as a whole."""

    def __init__(self, client: AsyncClient, model: Model, request: CompletionRequest) -> None:
        """Raises ApiError for a request that cannot be served."""
        self._client, self._model, self._request = client, model, request
        self._id, self._created = "cmpl-" + uuid.uuid4().hex, int(time.time())
        self.usage = Usage()
        self._count = request.n or 1
        prompts = _prompts(request.prompt)
        if len(prompts) * self._count > MAX_CHOICES:
            raise ApiError(
                f"prompt: expected at most {MAX_CHOICES} answers in all, found {len(prompts) * self._count}.", param="prompt"
            )
        self._prompt_too = request.echo and request.logprobs is not None
        """Whether the probabilities of the prompt are asked for."""
        if self._prompt_too:
            prompts = [self._tokens(prompt) for prompt in prompts]
        most = USUAL_TOKENS if request.max_tokens is None else request.max_tokens
        if most == 0 and not request.echo:
            raise ApiError("max_tokens: expected at least 1, or echo for the prompt alone.", param="max_tokens")
        guide = guides.of(request)
        self._skip = request.skip_special_tokens is not False
        self._asks = [
            Ask(
                prompt,
                max(most, 1),  # there is no answer of no token: one is generated, and left out
                special_tokens=request.add_special_tokens is not False,
                skip_special_tokens=self._skip,
                logprobs=request.logprobs,
                context=self._prompt_too,
                guide=guide,
                choice=choice,
            )
            for prompt in prompts
            for choice in range(self._count)
        ]
        self._silent = most == 0
        self._tensors = [tensors(request, ask, model) for ask in self._asks]

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        """The prompt whose probabilities are asked for. Raises ApiError."""
        request, model = self._request, self._model
        if request.stream:
            raise ApiError("echo: the probabilities of a prompt are not streamed. Leave stream, or logprobs, out.", param="echo")
        ids = model.encode(prompt, add_special_tokens=request.add_special_tokens is not False)
        if len(ids) * model.vocab_size > MAX_LOGITS:
            raise ApiError(
                f"prompt: expected at most {MAX_LOGITS // model.vocab_size} tokens with echo and logprobs, found {len(ids)}.",
                param="prompt",
            )
        return ids

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        async with contextlib.aclosing(merged([generate(self._client, self._model, each) for each in self._tensors])) as pieces:
            async for index, piece in pieces:
                yield index, piece.without_token() if self._silent else piece

    def _before(self, index: int) -> str:
        """The prompt, where it is asked for."""
        if not self._request.echo:
            return ""
        prompt = self._asks[index].prompt
        return prompt if isinstance(prompt, str) else self._model.tokenizer.decode(prompt, skip_special_tokens=self._skip)

    def _after(self, index: int) -> Probabilities:
        """The probabilities of what follows the prompt."""
        return Probabilities(self._model, offset=len(self._before(index)), skip_special_tokens=self._skip)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Chunks of the stream. Raises ApiError."""
        usage, wants, begun = self.usage, self._request.stream_options, set[int]()
        logs = [self._after(index) for index in range(len(self._asks))]
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                text = piece.text
                if index not in begun:
                    begun.add(index)
                    text = self._before(index) + text
                if piece.finish_reason is not None:
                    usage.add(piece, index // self._count)
                if text or piece.tokens or piece.finish_reason is not None:
                    lists = logs[index].of([piece]) if self._request.logprobs is not None else None
                    chunk = self._envelope() | {"choices": [_choice(index, text, lists, piece)]}
                    if wants is not None and wants.include_usage:
                        chunk["usage"] = usage.body() if wants.continuous_usage_stats else None
                    yield chunk
        if wants is not None and wants.include_usage:
            yield self._envelope() | {"choices": [], "usage": usage.body()}

    async def answer(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError."""
        found: list[list[Piece]] = [[] for _ in self._asks]
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                found[index].append(piece)
                if piece.finish_reason is not None:
                    self.usage.add(piece, index // self._count)
        choices = []
        for index, own in enumerate(found):
            text = self._before(index) + "".join(piece.text for piece in own)
            choices.append(_choice(index, text, self._lists(index, own), own[-1]))
        return self._envelope() | {"choices": choices, "usage": self.usage.body()}

    def _lists(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        after = self._after(index).of(pieces)
        prompt, logits = self._asks[index].prompt, pieces[-1].context
        if not self._prompt_too or isinstance(prompt, str) or logits is None:
            return after
        before = Probabilities(self._model, skip_special_tokens=self._skip).of_prompt(prompt, logits, self._request.logprobs)
        return before if after is None else {name: [*before[name], *after[name]] for name in before}

    def _envelope(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._request.model,
            "system_fingerprint": None,
        }


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, piece: Piece) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": piece.finish_reason,
        "stop_reason": piece.stop_reason,
    }


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError("prompt: expected a text or token ids, found nothing.", param="prompt")
    if isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    return [each for each in given if isinstance(each, str | list)]
