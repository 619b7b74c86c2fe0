"""Messages as clients send them, made into what chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from triton_repo.openai.chat_template import ChatTemplate
from triton_repo.openai.errors import ApiError


def for_template(messages: Sequence[dict[str, Any]], template: ChatTemplate) -> list[dict[str, Any]]:
    """Contents as one text each, arguments of tool calls as objects, and roles that the template has heard of.

    Raises ApiError for a message that is none.
    """
    found = []
    for place, message in enumerate(messages):
        role = message.get("role")
        if not isinstance(role, str):
            raise ApiError(f"messages[{place}].role: expected a text.", param="messages")
        if role == "developer" and not template.speaks_of("developer"):
            message = message | {"role": "system"}  # OpenAI's newer name for the same
        if message.get("tool_calls"):
            message = message | {"tool_calls": _calls(place, message["tool_calls"])}
        found.append(_flat(place, message))
    return found


def _calls(place: int, calls: Any) -> list[Any]:
    """The wire has arguments as JSON in a text; templates have been written for transformers, which wants objects."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ApiError(f"messages[{place}].tool_calls: expected a list of calls.", param="messages")
    return [call | {"function": _with_object(call["function"])} if "function" in call else call for call in calls]


def _with_object(function: Any) -> Any:
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return function
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return function
    return function | {"arguments": arguments} if isinstance(arguments, dict) else function


def _flat(place: int, message: dict[str, Any]) -> dict[str, Any]:
    """Contents that are a list of texts, as one text."""
    content = message.get("content")
    if not isinstance(content, list):
        if content is not None and not isinstance(content, str):
            raise ApiError(f"messages[{place}].content: expected a text or a list of texts.", param="messages")
        return message
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "input_text") or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ApiError(f"messages[{place}].content: expected parts of type text, found {str(kind)[:40]}.", param="messages")
        texts.append(part["text"])
    return message | {"content": "\n".join(texts)}
