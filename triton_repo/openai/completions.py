"""POST /v1/completions: a text, or token ids, and what follows."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from triton_repo.async_client import AsyncClient
from triton_repo.openai import guides
from triton_repo.openai.errors import ApiError
from triton_repo.openai.generation import Ask, Piece, generate, tensors
from triton_repo.openai.models import Model
from triton_repo.openai.requests import MAX_CHOICES, CompletionRequest
from triton_repo.openai.streams import Event, Usage, merged

USUAL_TOKENS = 16
"""What OpenAI generates where a request does not say."""


class Completion:
    """One request to the endpoint: `events` as a stream, or `answer` as a whole."""

    def __init__(self, client: AsyncClient, model: Model, request: CompletionRequest) -> None:
        """Raises ApiError for a request that cannot be served."""
        self._client, self._model, self._request = client, model, request
        self._id, self._created = "cmpl-" + uuid.uuid4().hex, int(time.time())
        prompts = _prompts(request.prompt)
        count = request.n or 1
        if len(prompts) * count > MAX_CHOICES:
            raise ApiError(
                f"prompt: expected at most {MAX_CHOICES} answers in all, found {len(prompts) * count}.", param="prompt"
            )
        guide = guides.of(request)
        self._asks = [
            Ask(
                prompt,
                request.max_tokens or USUAL_TOKENS,
                special_tokens=request.add_special_tokens is not False,
                skip_special_tokens=request.skip_special_tokens is not False,
                logprobs=request.logprobs,
                guide=guide,
                choice=choice,
            )
            for prompt in prompts
            for choice in range(count)
        ]
        self._tensors = [tensors(request, ask, model) for ask in self._asks]

    def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        return merged([generate(self._client, self._model, each) for each in self._tensors])

    def _before(self, index: int) -> str:
        """The prompt, where it is asked for."""
        if not self._request.echo:
            return ""
        prompt = self._asks[index].prompt
        return prompt if isinstance(prompt, str) else self._model.tokenizer.decode(prompt)

    async def events(self) -> AsyncGenerator[Event, None]:
        """Chunks of the stream. Raises ApiError."""
        usage, wants = Usage(), self._request.stream_options
        begun: set[int] = set()
        lengths = [0] * len(self._asks)
        async for index, piece in self._pieces():
            text = piece.text
            if index not in begun:
                begun.add(index)
                text = self._before(index) + text
            if piece.finish_reason is not None:
                usage.add(piece)
            finish = None if piece.finish_reason is None else _finish(piece)
            if text or piece.tokens or finish is not None:
                offset, lengths[index] = lengths[index], lengths[index] + len(text)
                chunk = self._envelope() | {"choices": [self._choice(index, text, [piece], offset, finish, piece.stop_reason)]}
                if wants is not None and wants.include_usage:
                    chunk["usage"] = usage.body() if wants.continuous_usage_stats else None
                yield chunk
        if wants is not None and wants.include_usage:
            yield self._envelope() | {"choices": [], "usage": usage.body()}

    async def answer(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError."""
        pieces: list[list[Piece]] = [[] for _ in self._asks]
        usage = Usage()
        async for index, piece in self._pieces():
            pieces[index].append(piece)
        choices = []
        for index, found in enumerate(pieces):
            if not found or found[-1].finish_reason is None:
                raise ApiError("The answer ended before it was complete.", status=503, kind="server_error")
            if index % (self._request.n or 1) == 0:
                usage.prompt += found[-1].prompt_tokens
            usage.completion += found[-1].completion_tokens
            text, last = self._before(index) + "".join(piece.text for piece in found), found[-1]
            choices.append(self._choice(index, text, found, 0, _finish(last), last.stop_reason))
        return self._envelope() | {"choices": choices, "usage": usage.body()}

    def _choice(
        self, index: int, text: str, pieces: Sequence[Piece], offset: int, finish: str | None, stop: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._request.logprobs is not None and any(piece.tokens for piece in pieces):
            logprobs = self._probabilities(pieces, offset + (len(self._before(index)) if offset == 0 else 0))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, "stop_reason": stop}

    def _probabilities(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any]:
        tokens: list[str] = []
        values: list[float] = []
        top: list[dict[str, float]] = []
        offsets: list[int] = []
        for piece in pieces:
            rows: Sequence[Sequence[tuple[int, float]]] = piece.top or [()] * len(piece.tokens)
            for token, value, row in zip(piece.tokens, piece.log_probs, rows, strict=False):
                tokens.append(self._spelled(token))
                values.append(max(value, -9999.0))
                alternatives = {self._spelled(other): max(number, -9999.0) for other, number in row}
                top.append(alternatives | {tokens[-1]: values[-1]})  # the chosen one is always there, as OpenAI has it
                offsets.append(offset)
                offset += len(tokens[-1])
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _spelled(self, token: int) -> str:
        """A token's text; the bytes of one that is a part of a character, as OpenAI writes them."""
        data = self._model.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _envelope(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._request.model,
            "system_fingerprint": None,
        }


def _finish(piece: Piece) -> str:
    return "length" if piece.finish_reason == "length" else "stop"


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError("prompt: expected a text or token ids, found nothing.", param="prompt")
    if isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    return [each for each in given if isinstance(each, str | list)]
