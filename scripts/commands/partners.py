"""Whom `ngpt-deploy chat` talks with: an engine in this process, a Triton server, or a server of OpenAI's interface."""

import argparse
import contextlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ngpt.errors import ConfigError, ServerError

Message = dict[str, str]
Piece = tuple[str, str]
"""Its kind, "content" or "reasoning_content", and its text."""
OF_TRITON = "a Triton server is asked with --url HOST:PORT and --repository"


class Partner(Protocol):
    """Answers a conversation."""

    name: str

    def answer(self, history: list[Message]) -> Iterator[Piece]:
        """Pieces of what follows. Raises NGPTDeployError, ServingError, TemplateError."""


def template_of(folder: Path, file: Path | None = None) -> Any:
    """The chat template beside a tokenizer, or that of `file`. Raises ConfigError where there is none."""
    from triton_repo.openai.chat_template import ChatTemplate

    found = ChatTemplate.load(folder, file)
    if found is None:
        raise ConfigError(f"{folder} has no chat template", remedy="give one with --chat-template, or use `ngpt-deploy generate`")
    return found


def served_model(repository: Path, name: str | None = None, file: Path | None = None) -> Any:
    """A model of a repository with its chat template; the first if none is named. Raises ConfigError, ServerError."""
    from triton_repo.openai.models import open_models

    models = open_models(repository, chat_template=file)
    found = models.get(name) if name is not None else next(iter(models.values()))
    if found is None:
        raise ServerError("--model", expected=", ".join(models), found=str(name)[:100])
    if found.template is None:
        raise ConfigError(f"{found.name} has no chat template", remedy="give one with --chat-template")
    return found


def message_prompt(template: Any, message: str) -> str:
    """One message of a user through a template. Raises TemplateError."""
    return str(template.render([{"role": "user", "content": message}]))


class _Talk:
    """What an engine and a Triton server have in common: the template is rendered here, and the reasoning is told apart here."""

    def __init__(self, template: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        from triton_repo.openai.tags import Tags

        self._template, self._args = template, args
        self._tags = Tags(*(args.reasoning_tags or ("<think>", "</think>")))
        # A tag that is a special token is in the text only if those are shown.
        self._hidden = all(tokenizer.special_token(tag) is None for tag in (self._tags.open, self._tags.close))

    def answer(self, history: list[Message]) -> Iterator[Piece]:
        """As Partner's."""
        from triton_repo.openai.requests import Request
        from triton_repo.openai.tags import Splitter

        args = self._args
        prompt = self._template.render(history, variables={"enable_thinking": False} if args.no_thinking else {})
        asked = {"model": "", "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        splitter = Splitter(self._tags, inside=prompt.rstrip().endswith(self._tags.open), once=True)
        with contextlib.closing(self._texts(prompt, Request.model_validate(asked))) as texts:
            for text in texts:
                for inside, part, _ in splitter.push(text):
                    yield ("reasoning_content" if inside else "content"), part
        for inside, part in splitter.flush():
            yield ("reasoning_content" if inside else "content"), part

    def _texts(self, prompt: str, asked: Any) -> Any:
        """A generator of what follows a prompt."""
        raise NotImplementedError


class Local(_Talk):
    """An engine in this process."""

    def __init__(self, engine: Any, template: Any, args: argparse.Namespace) -> None:
        super().__init__(template, engine.tokenizer, args)
        self.name: str = engine.manifest.name
        self._engine = engine

    def _texts(self, prompt: str, asked: Any) -> Any:
        from engines.runtime.text import TextStream
        from triton_repo.openai.generation import sampling

        engine, most = self._engine, self._args.max_tokens
        ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
        room = engine.manifest.model.max_length - len(ids)
        if room < 1:
            raise ConfigError("the conversation is too long for the model", remedy="/reset")
        handle = engine.submit(ids, min(most or room, room), seed=asked.seed, **sampling(asked, engine.manifest.generation))
        stream = TextStream(engine.tokenizer, context=ids, skip_special_tokens=self._hidden)
        try:
            for event in handle:
                if event.has_token and event.finish_reason != "eos":
                    yield stream.push(event.token)
            yield stream.flush()
        finally:
            handle.cancel()


class Served(_Talk):
    """A Triton server with our repository."""

    def __init__(self, args: argparse.Namespace) -> None:
        from triton_repo.client import check_url

        self._url = args.url or "127.0.0.1:8001"
        check_url(self._url)
        self._model = served_model(args.repository, args.model, args.chat_template)
        self.name: str = self._model.name
        super().__init__(self._model.template, self._model.tokenizer, args)

    def _texts(self, prompt: str, asked: Any) -> Any:
        from triton_repo.client import responses
        from triton_repo.openai.generation import Ask, tensors

        ask = Ask(prompt, self._args.max_tokens, special_tokens=False, skip_special_tokens=self._hidden)
        with contextlib.closing(responses(self._url, self._model.served, tensors(asked, ask, self._model))) as results:  # type: ignore[type-var]
            for result in results:
                text = result.as_numpy("text_output")
                yield "" if text is None else b"".join(text.reshape(-1).tolist()).decode("utf-8", "replace")


class Remote:
    """A server of OpenAI's interface."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._base = args, (args.url or "http://127.0.0.1:8080/v1").rstrip("/")
        if not re.fullmatch(r"https?://[^/]+(/.*)?", self._base):
            raise ServerError(
                "the server's address", expected="such as http://127.0.0.1:8080/v1", found=self._base[:200], remedy=OF_TRITON
            )
        self.name = args.model or self._first()

    def answer(self, history: list[Message]) -> Iterator[Piece]:
        """Pieces of what follows. Raises ServerError."""
        args = self._args
        body: dict[str, Any] = {"model": self.name, "messages": history, "stream": True}
        given = {"max_tokens": args.max_tokens, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
        body |= {name: value for name, value in given.items() if value is not None}
        if args.no_thinking:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        with self._open("/chat/completions", body) as response:
            for line in response:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise ServerError("the server broke off", found=str(event["error"].get("message"))[:300])
                for choice in event["choices"]:
                    for kind in ("reasoning_content", "content"):
                        if text := choice["delta"].get(kind):
                            yield kind, text

    def _first(self) -> str:
        with self._open("/models") as response:
            found = json.load(response)["data"]
        if not found:
            raise ServerError(f"{self._base} serves no model")
        return str(found[0]["id"])

    @contextlib.contextmanager
    def _open(self, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
        key = os.environ.get("OPENAI_API_KEY") or os.environ.get("NGPT_API_KEY", "none").split(",")[0]
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self._base + path, None if body is None else json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                yield response
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                said = json.loads(said)["error"]["message"]
            remedy = "Set OPENAI_API_KEY." if error.code == 401 else ""
            raise ServerError(f"the server refused with {error.code}", found=said[:300], remedy=remedy) from error
        except OSError as error:
            raise ServerError(
                f"no server answers at {self._base}",
                found=str(error)[:200],
                remedy="start one with `ngpt-deploy serve REPOSITORY --openai-port 8080`",
            ) from error
