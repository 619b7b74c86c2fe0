"""POST /v1/chat/completions: messages to a prompt, pieces to deltas."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from triton_repo.async_client import AsyncClient
from triton_repo.openai import guides
from triton_repo.openai.chat_template import TemplateError
from triton_repo.openai.errors import ApiError
from triton_repo.openai.generation import Ask, Piece, generate, tensors
from triton_repo.openai.messages import for_template
from triton_repo.openai.models import Model
from triton_repo.openai.rendering import Renderer
from triton_repo.openai.requests import ChatRequest
from triton_repo.openai.streams import Event, Usage, merged
from triton_repo.openai.tags import Splitter, Tags, tool_call


@dataclass(frozen=True)
class Style:
    """How this server's models mark what is no answer: tags of reasoning, and of tool calls; None where they have none."""

    reasoning: Tags | None = None
    tool_calls: Tags | None = None


@dataclass
class _Choice:
    """What one choice has said so far, told apart into reasoning, content and tool calls."""

    reasoning: Splitter | None
    calls: Splitter | None
    forced: str | None
    """The tool that the whole content is the arguments of; "" where its name is in the content, too."""
    call_id: str = field(default_factory=lambda: "call_" + uuid.uuid4().hex[:24])
    called: int = 0
    held: str = ""

    def push(self, text: str) -> Iterator[dict[str, Any]]:
        """Deltas for a piece of text."""
        for inside, part, _ in self.reasoning.push(text) if self.reasoning is not None else [(False, text, False)]:
            yield from [{"reasoning_content": part}] * bool(part) if inside else self._content(part)

    def flush(self) -> Iterator[dict[str, Any]]:
        """Deltas for what was held back."""
        for inside, part in self.reasoning.flush() if self.reasoning is not None else ():
            yield from [{"reasoning_content": part}] * bool(part) if inside else self._content(part)
        for inside, part in self.calls.flush() if self.calls is not None else ():
            self.held += part if inside else ""
            yield from self._plain("" if inside else part)
        if self.held:
            yield from self._call(self.held)

    def _content(self, text: str) -> Iterator[dict[str, Any]]:
        if self.forced:
            if text:
                head = {} if self.called else {"id": self.call_id, "type": "function"}
                name = {} if self.called else {"name": self.forced}
                self.called = 1
                yield {"tool_calls": [{"index": 0, **head, "function": {**name, "arguments": text}}]}
        elif self.forced == "":
            self.held += text
        elif self.calls is None:
            yield from self._plain(text)
        else:
            for inside, part, closed in self.calls.push(text):
                if inside:
                    self.held += part
                    if closed:
                        yield from self._call(self.held)
                        self.held = ""
                else:
                    yield from self._plain(part)

    def _call(self, text: str) -> Iterator[dict[str, Any]]:
        call = tool_call(text)
        if call is None:  # what was meant as one and is none: the client sees what the model said
            yield from self._plain(text)
            return
        entry = {"index": self.called, "id": "call_" + uuid.uuid4().hex[:24], "type": "function", "function": call}
        self.called += 1
        yield {"tool_calls": [entry]}

    @staticmethod
    def _plain(text: str) -> Iterator[dict[str, Any]]:
        if text:
            yield {"content": text}


async def prompt_of(request: ChatRequest, model: Model, renderer: Renderer) -> str:
    """The messages as the model's template writes them. Raises ApiError."""
    if model.template is None:
        raise ApiError(
            f"The model {model.name} has no chat template. Use /v1/completions, or start this with --chat-template.",
            code="no_chat_template",
        )
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    for name in ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"):
        if name in variables:
            raise ApiError(f"chat_template_kwargs: {name} is a field of its own.", param="chat_template_kwargs")
    messages = for_template(request.messages, model.template)
    try:
        return await renderer.render(
            model.name,
            messages=messages,
            tools=None if request.tool_choice == "none" else request.tools,
            documents=request.documents,
            add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
            continue_final_message=request.continue_final_message,
            variables=variables,
        )
    except TemplateError as error:
        raise ApiError(str(error), param="messages") from error


class Chat:
    """One request to the endpoint: `events` as a stream, or `answer` as a whole."""

    def __init__(self, client: AsyncClient, model: Model, request: ChatRequest, style: Style, prompt: str) -> None:
        """prompt: as `prompt_of` renders it. Raises ApiError for a request that cannot be served."""
        self._client, self._model, self._request, self._style = client, model, request, style
        self._id, self._created = "chatcmpl-" + uuid.uuid4().hex, int(time.time())
        self.usage = Usage()
        if (request.top_logprobs or 0) and not request.logprobs:
            raise ApiError("top_logprobs: expected logprobs to be true.", param="top_logprobs")
        # A template that switches reasoning off closes it in the prompt.
        self._reasons = (
            style.reasoning if style.reasoning is None or not prompt.rstrip().endswith(style.reasoning.close) else None
        )
        self._opened = self._reasons is not None and prompt.rstrip().endswith(self._reasons.open)
        forced = guides.tool(request)
        self._forced = None if forced is None else forced[1] or ""
        guide = forced[0] if forced is not None else guides.of(request)
        special = model.tokenizer.special_token
        tags = [tag for each in (style.reasoning, style.tool_calls) if each is not None for tag in (each.open, each.close)]
        if guide is not None and self._reasons is not None:
            opening = (self._opened, special(self._reasons.open))
            guide = guides.after_reasoning(guide, self._reasons, special(self._reasons.close), opening)
        # A tag that is a special token is in the text only if those are shown.
        shown = any(special(tag) is not None for tag in tags)
        skip = not shown if request.skip_special_tokens is None else request.skip_special_tokens
        self._asks = [
            Ask(
                prompt,
                request.max_completion_tokens or request.max_tokens,
                special_tokens=bool(request.add_special_tokens),
                skip_special_tokens=skip,
                logprobs=(request.top_logprobs or 0) if request.logprobs else None,
                guide=guide,
                choice=choice,
            )
            for choice in range(request.n or 1)
        ]
        self._tensors = [tensors(request, ask, model) for ask in self._asks]

    def _choice(self) -> _Choice:
        style = self._style
        reasoning = None if self._reasons is None else Splitter(self._reasons, inside=self._opened, once=True)
        calls = None if style.tool_calls is None or not self._request.tools else Splitter(style.tool_calls)
        if self._request.tool_choice == "none":
            calls = None
        return _Choice(reasoning, calls, self._forced)

    def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        return merged([generate(self._client, self._model, each) for each in self._tensors])

    async def events(self) -> AsyncGenerator[Event, None]:
        """Chunks of the stream. Raises ApiError, before the first of them where the server refuses."""
        choices, usage = [self._choice() for _ in self._asks], self.usage
        begun: set[int] = set()
        wants = self._request.stream_options
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                choice = choices[index]
                deltas = list(choice.push(piece.text))
                if piece.finish_reason is not None:
                    deltas += choice.flush()
                    usage.add(piece)
                if index not in begun:
                    begun.add(index)
                    yield self._chunk(index, {"role": "assistant", "content": ""}, usage=usage)
                probabilities = self._probabilities(piece)
                if not deltas and probabilities is not None:
                    deltas = [{"content": ""}]
                for delta in deltas:
                    yield self._chunk(index, delta, logprobs=probabilities, usage=usage)
                    probabilities = None
                if piece.finish_reason is not None:
                    yield self._chunk(index, {}, finish=self._finish(choice, piece), stop=piece.stop_reason, usage=usage)
        if wants is not None and wants.include_usage:
            yield self._envelope("chat.completion.chunk") | {"choices": [], "usage": usage.body()}

    async def answer(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError."""
        choices = [self._choice() for _ in self._asks]
        messages: list[dict[str, Any]] = [{"role": "assistant", "content": "", "tool_calls": []} for _ in choices]
        ends: list[Piece | None] = [None] * len(choices)
        logs: list[list[dict[str, Any]]] = [[] for _ in choices]
        usage = self.usage
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                deltas = list(choices[index].push(piece.text))
                logs[index] += (self._probabilities(piece) or {"content": []})["content"]
                if piece.finish_reason is not None:
                    deltas += choices[index].flush()
                    usage.add(piece)
                    ends[index] = piece
                for delta in deltas:
                    _join(messages[index], delta)
        answers = []
        for index, (message, end) in enumerate(zip(messages, ends, strict=True)):
            if end is None:
                raise ApiError("The answer ended before it was complete.", status=503, kind="server_error")
            if not message["tool_calls"]:
                del message["tool_calls"]
            elif not message["content"]:
                message["content"] = None
            answers.append(
                {
                    "index": index,
                    "message": message | {"refusal": None},
                    "logprobs": {"content": logs[index]} if self._request.logprobs else None,
                    "finish_reason": self._finish(choices[index], end),
                    "stop_reason": end.stop_reason,
                }
            )
        return self._envelope("chat.completion") | {"choices": answers, "usage": usage.body()}

    def _finish(self, choice: _Choice, piece: Piece) -> str:
        if piece.finish_reason == "stop" and choice.called and not self._forced:
            return "tool_calls"
        return "length" if piece.finish_reason == "length" else "stop"

    def _probabilities(self, piece: Piece) -> dict[str, Any] | None:
        if not self._request.logprobs or not piece.tokens:
            return None
        count = self._request.top_logprobs or 0
        rows: Sequence[Sequence[tuple[int, float]]] = piece.top or [()] * len(piece.tokens)
        entries = zip(piece.tokens, piece.log_probs, rows, strict=False)
        content = [
            self._entry(token, value) | {"top_logprobs": [self._entry(other, number) for other, number in row[:count]]}
            for token, value, row in entries
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        data = self._model.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(value, -9999.0), "bytes": list(data)}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "system_fingerprint": None,
        }

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        usage: Usage,
        finish: str | None = None,
        stop: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> Event:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if finish is not None:
            choice["stop_reason"] = stop
        chunk = self._envelope("chat.completion.chunk") | {"choices": [choice]}
        wants = self._request.stream_options
        if wants is not None and wants.include_usage:
            chunk["usage"] = usage.body() if wants.continuous_usage_stats else None
        return chunk


def _join(message: dict[str, Any], delta: dict[str, Any]) -> None:
    """Add a delta to a whole message."""
    for name in ("content", "reasoning_content"):
        if name in delta:
            message[name] = (message.get(name) or "") + delta[name]
    for call in delta.get("tool_calls", ()):
        calls = message["tool_calls"]
        if call["index"] == len(calls):
            calls.append({"id": call["id"], "type": "function", "function": {"name": "", "arguments": ""}})
        entry = calls[call["index"]]["function"]
        entry["name"] += call["function"].get("name", "")
        entry["arguments"] += call["function"].get("arguments", "")
