"""What an answer is held to, as the served model's guide."""

from __future__ import annotations

import json
import re
from typing import Any

from engines.runtime.guidance import JSON_SPACE
from triton_repo.openai.errors import ApiError
from triton_repo.openai.requests import ChatRequest, Request
from triton_repo.openai.tags import Tags

ANY_OBJECT = '{"type": "object"}'
Guide = tuple[str, str]
"""Its kind and its text, as inputs of the served model."""


def of(request: Request) -> Guide | None:
    """The guide that a request names, by whichever of the fields. Raises ApiError for two of them, or one that is none."""
    structured = request.structured_outputs
    given = [
        _response_format(request.response_format),
        _schema("guided_json", request.guided_json),
        None if request.guided_regex is None else ("regex", request.guided_regex),
        None if request.guided_choice is None else ("choice", json.dumps(request.guided_choice)),
        None if request.guided_grammar is None else ("ebnf_grammar", request.guided_grammar),
    ]
    if structured is not None:
        given += [
            _schema("structured_outputs.json", structured.json_),
            None if structured.regex is None else ("regex", structured.regex),
            None if structured.choice is None else ("choice", json.dumps(structured.choice)),
            None if structured.grammar is None else ("ebnf_grammar", structured.grammar),
            ("json", "") if structured.json_object else None,
        ]
    found = [guide for guide in given if guide is not None]
    if len(found) > 1:
        raise ApiError("response_format: expected one thing that the answer is held to, found several.", param="response_format")
    return found[0] if found else None


def tool(request: ChatRequest) -> tuple[Guide, str | None] | None:
    """The guide of a tool that must be called, and its name where it is one alone; None where the model may choose."""
    choice = request.tool_choice
    if choice in (None, "none", "auto"):
        return None
    tools = [each.get("function") for each in request.tools or ()]
    functions = [each for each in tools if isinstance(each, dict) and isinstance(each.get("name"), str)]
    if len(functions) < len(request.tools or ()) or not functions:
        raise ApiError("tools: expected functions with a name.", param="tools")
    if isinstance(choice, dict):
        named = choice.get("function")
        name = named.get("name") if isinstance(named, dict) else None
        functions = [each for each in functions if each["name"] == name]
        if not functions:
            raise ApiError("tool_choice: expected one of the functions in tools.", param="tool_choice")
        return ("json_schema", json.dumps(_parameters(functions[0]))), functions[0]["name"]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": each["name"]}, "arguments": _parameters(each)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for each in functions
    ]
    return ("json_schema", json.dumps({"anyOf": calls} if len(calls) > 1 else calls[0])), None


def after_reasoning(guide: Guide, tags: Tags, token: int | None, opened: tuple[bool, int | None]) -> Guide:
    """The guide for what follows the reasoning, which is free: its text up to the closing tag, as a Lark grammar.

    token: the closing tag's id where it is a special token, which a grammar names by its number. opened: whether the prompt has
    opened the reasoning, and the opening tag's id; where it has not, the model may.
    """
    kind, text = guide
    close = f"<[{token}]>" if token is not None else _quoted(tags.close)
    free = "FREE: /(.|\\n)*/\n" if token is not None else ""
    reasoning = f"FREE {close}" if token is not None else "reasoning"
    if token is None:
        free = f"reasoning[lazy]: /(.|\\n)*{_escaped(tags.close)}/\n"
    if not opened[0]:
        start = f"<[{opened[1]}]>" if opened[1] is not None else _quoted(tags.open)
        reasoning = f"({start} {reasoning} WHITE?)?"
    else:
        reasoning += " WHITE?"
    if kind in ("json", "json_schema"):
        schema = json.loads(text or ANY_OBJECT) | {"x-guidance": {"whitespace_pattern": JSON_SPACE}}
        answer = f"answer: %json {json.dumps(schema)}\n"
    elif kind == "regex":
        answer = f"answer: /{_between_slashes(text)}/\n"
    elif kind == "choice":
        answer = "answer: " + " | ".join(_quoted(each) for each in json.loads(text)) + "\n"
    else:
        raise ApiError(
            "guided_grammar: expected a schema, an expression or a list for a model that reasons first.", param="guided_grammar"
        )
    return "lark_grammar", f"start: {reasoning} answer\nWHITE: /[ \\n]{{1,4}}/\n{free}{answer}"


def _between_slashes(expression: str) -> str:
    """A regular expression as Lark writes it: what would end it is escaped, what is escaped stays."""
    parts = re.findall(r"\\.|.", expression, re.DOTALL)
    return "".join({"/": "\\/", "\n": "\\n"}.get(part, part) for part in parts)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A text as an expression that matches it alone, as Lark writes it."""
    return _between_slashes("".join("\\" + letter if letter in r"\.+*?()|[]{}^$" else letter for letter in text))


def _response_format(given: dict[str, Any] | None) -> Guide | None:
    kind = None if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return "json", ""
    if kind == "json_schema":
        schema = given.get("json_schema")
        if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
            raise ApiError("response_format.json_schema.schema: expected a schema.", param="response_format")
        return _schema("response_format", schema["schema"])
    raise ApiError('response_format.type: expected "text", "json_object" or "json_schema".', param="response_format")


def _schema(name: str, given: Any) -> Guide | None:
    if given is None:
        return None
    try:
        found = json.loads(given) if isinstance(given, str) else given
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return "json_schema", json.dumps(found)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"{name}: expected a JSON schema ({error})."[:300], param=name.split(".")[0]) from None


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    found = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(found, dict):
        raise ApiError("tools: expected a schema of parameters.", param="tools")
    return found
