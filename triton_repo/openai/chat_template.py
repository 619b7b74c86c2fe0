"""Messages to the text of a prompt, by a model's own template, as transformers renders it (`apply_chat_template` of 5.24)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ngpt.errors import ConfigError

TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 1 << 20
MAX_PROMPT_CHARS = 8 << 20
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTINUE = "<<the answer goes on here>> "
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateError(ValueError):
    """Messages that the template refuses, or cannot render."""


class ChatTemplate:
    """A model's templates. `named`: the source of each; `tokens`: special tokens by the names that templates know."""

    def __init__(self, named: Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        """Raises ConfigError for a source that is no template."""
        self._tokens = dict(tokens or {})
        self._environment = _environment()
        self._sources = dict(named)
        self._compiled: dict[str, jinja2.Template] = {}
        for name, source in named.items():
            try:
                self._environment.parse(source)  # compiling it would compute its constants, however large
            except (jinja2.TemplateError, RecursionError) as error:
                raise ConfigError(
                    f"the chat template {name}",
                    expected="a jinja2 template",
                    found=f"{error}"[:200],
                    remedy="give another with --chat-template",
                ) from error

    def description(self) -> dict[str, Any]:
        """As JSON; `ChatTemplate(**description)` is the same."""
        return {"named": self._sources, "tokens": self._tokens}

    def speaks_of(self, word: str) -> bool:
        """Whether a source has this word in it."""
        return any(word in source for source in self._sources.values())

    @classmethod
    def load(cls, folder: Path, file: Path | None = None) -> ChatTemplate | None:
        """The template of a tokenizer's folder, or of `file` in its place; None where there is none. Raises ConfigError."""
        config = _object(folder / TOKENIZER_CONFIG)
        tokens = {name: _token_text(config[name]) for name in _TOKENS if config.get(name) is not None}
        named: dict[str, str] = {}
        given = config.get("chat_template")
        if isinstance(given, str):
            named["default"] = given
        elif isinstance(given, list):
            entries = [entry for entry in given if isinstance(entry, dict)]
            named = {str(entry["name"]): str(entry["template"]) for entry in entries if "name" in entry and "template" in entry}
        path = file if file is not None else folder / TEMPLATE_FILE
        if file is not None or path.is_file():
            named = {**named, "default": _read(path)} if file is None else {"default": _read(path)}
        return cls(named, tokens) if named else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. Messages, tools and variables are JSON values. Raises TemplateError with the template's own words."""
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise TemplateError(f"this model has no template named {name}")
        # Clients send null for what is not there, at which many templates stumble.
        there = [{key: value for key, value in message.items() if value is not None} for message in messages]
        chat = [_with_reasoning(message) for message in there]
        if continue_final_message:
            chat[-1] = _tagged(chat[-1])
        known = {"messages": chat, "tools": tools or None, "documents": documents or None}
        text = ""
        try:
            if name not in self._compiled:
                self._compiled[name] = self._environment.from_string(self._sources[name])
            pieces = self._compiled[name].generate(
                {**self._tokens, **(variables or {}), **known, "add_generation_prompt": add_generation_prompt}
            )
            for piece in pieces:
                text += piece
                if len(text) > MAX_PROMPT_CHARS:
                    raise TemplateError(f"the prompt would be longer than {MAX_PROMPT_CHARS} characters")
        except TemplateError:
            raise
        except Exception as error:  # a template's own refusal, or whatever it stumbles over in these messages
            raise TemplateError(f"the chat template refuses these messages: {error}"[:500]) from error
        return _cut(text) if continue_final_message else text


def _tagged(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
        return message | {"content": [*content[:-1], content[-1] | {"text": content[-1]["text"] + _CONTINUE}]}
    if not isinstance(content, str):
        raise TemplateError("continue_final_message: the last message has no text to go on with")
    return message | {"content": content + _CONTINUE}


def _cut(text: str) -> str:
    """Up to where the last message goes on; a template that strips messages has taken the blank at its end, too."""
    place = text.rfind(_CONTINUE.strip())
    if place < 0:
        raise TemplateError("continue_final_message: the template leaves the last message out")
    return text[:place] if text.startswith(_CONTINUE, place) else text[:place].rstrip()


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read a message's reasoning by one of several names."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model itself has said, for training; here it is just its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's own, without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        found = dict(*rest, **values)
        for name in found:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Without jinja2's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) and "content" in value else str(value)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise ConfigError(f"{path.name}", expected=f"at most {MAX_TEMPLATE_BYTES} bytes", found="more")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}", expected="a chat template in UTF-8", found=str(error)[:200]) from error


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}", expected="a JSON object", found=str(error)[:200]) from error
    return found if isinstance(found, dict) else {}
