"""chat: a conversation in the terminal, with an engine folder or a server of OpenAI's interface."""

import argparse
import contextlib
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ngpt.errors import ConfigError, ServerError
from scripts.commands.options import Command, positive
from scripts.signals import Terminated
from scripts.terminal import harmless

HELP = "/reset: forget what was said   /system TEXT: what the model is to be   /retry: the last answer again   /quit"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
Message = dict[str, str]
Piece = tuple[str, str]
"""Its kind, "content" or "reasoning_content", and its text."""


def add_chat(command: Command) -> None:
    """`ngpt-deploy chat`."""
    chat = command("chat", _chat, "Talk with a model in the terminal. Ctrl-C stops an answer, /quit or Ctrl-D ends.")
    where = chat.add_mutually_exclusive_group()
    where.add_argument(
        "--url", default="http://127.0.0.1:8080/v1", help="of OpenAI's interface, which `serve --openai-port` prints"
    )
    where.add_argument("--engine", type=Path, help="engine folder, run in this process; its tokenizer has a chat template")
    chat.add_argument("--model", help="the server's model; its first if not given")
    chat.add_argument("--chat-template", type=Path, metavar="FILE", help="with --engine: in place of its own")
    chat.add_argument(
        "--reasoning-tags", nargs=2, default=("<think>", "</think>"), metavar=("OPEN", "CLOSE"), help="with --engine"
    )
    chat.add_argument(
        "--no-thinking", action="store_true", help="ask the template for an answer without reasoning (enable_thinking)"
    )
    chat.add_argument("--system", help="what the model is to be")
    chat.add_argument("--max-tokens", type=positive, help="most tokens of an answer; what fits if not given")
    for name in ("temperature", "top-p"):
        chat.add_argument(f"--{name}", type=float, metavar="N", help="as the model has it if not given")
    chat.add_argument("--seed", type=int, metavar="N")


def chat_prompt(engine: Path, message: str, file: Path | None = None) -> str:
    """One message of a user through an engine's template. Raises ConfigError where there is none, TemplateError."""
    return str(_template(engine, file).render([{"role": "user", "content": message}]))


def _template(engine: Path, file: Path | None) -> Any:
    from triton_repo.openai.chat_template import ChatTemplate

    found = ChatTemplate.load(engine, file)
    if found is None:
        raise ConfigError(f"{engine} has no chat template", remedy="give one with --chat-template, or use `ngpt-deploy generate`")
    return found


def _chat(args: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # edits and remembers what is typed
    with contextlib.ExitStack() as stack:
        model: _Local | _Remote
        if args.engine is not None:
            from engines import load_engine

            template = _template(args.engine, args.chat_template)
            model = _Local(stack.enter_context(load_engine(args.engine, num_slots=1)), template, args)
        else:
            model = _Remote(args)
        print(f"{model.name}. {HELP}", file=sys.stderr)
        _converse(model, args.system)
    return 0


def _converse(model: "_Local | _Remote", system: str | None) -> None:
    """Read, answer, remember."""
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return
        if word == "/reset":
            history = [message for message in history if message["role"] == "system"]
            continue
        if word == "/system":
            history = [{"role": "system", "content": rest}] if rest else []
            continue
        if word == "/retry":
            if history and history[-1]["role"] == "assistant":
                history.pop()
        elif word.startswith("/") and len(word) > 1:
            print(HELP, file=sys.stderr)
            continue
        elif line.strip():
            history.append({"role": "user", "content": line})
        if history and history[-1]["role"] == "user":
            if answer := _say(model.answer(history)):
                history.append({"role": "assistant", "content": answer})
            else:
                history.pop()  # what has no answer is not said


def _say(pieces: Iterator[Piece]) -> str:
    """Print an answer as it comes, its reasoning dimmed; what there is of it when Ctrl-C stops it."""
    text, on_terminal, dimmed = "", sys.stdout.isatty(), False
    try:
        with contextlib.closing(pieces):  # type: ignore[type-var]
            for kind, piece in pieces:
                if on_terminal and (kind != "content") != dimmed:
                    dimmed = kind != "content"
                    print(DIM if dimmed else PLAIN, end="")
                print(harmless(piece) if on_terminal else piece, end="", flush=True)
                text += piece if kind == "content" else ""
    except Terminated:
        raise
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except (ServerError, ValueError) as error:  # of a request, or of the template; what follows may be good
        print(f"{error}", file=sys.stderr)
    print(PLAIN if dimmed else "")
    return text


class _Local:
    """An engine in this process."""

    def __init__(self, engine: Any, template: Any, args: argparse.Namespace) -> None:
        from triton_repo.openai.tags import Tags

        self.name = engine.manifest.name
        self._engine, self._template, self._args, self._tags = engine, template, args, Tags(*args.reasoning_tags)

    def answer(self, history: list[Message]) -> Iterator[Piece]:
        """Pieces of what follows. Raises TemplateError, ServingError."""
        from engines.runtime.text import TextStream
        from triton_repo.openai.generation import sampling
        from triton_repo.openai.requests import Request
        from triton_repo.openai.tags import Splitter

        args, engine = self._args, self._engine
        variables = {"enable_thinking": False} if args.no_thinking else {}
        prompt = self._template.render(history, variables=variables)
        ids = engine.tokenizer.encode(prompt, add_special_tokens=False)
        room = engine.manifest.model.max_length - len(ids)
        if room < 1:
            raise ConfigError("the conversation is too long for the model", remedy="/reset")
        asked = Request.model_validate({"model": "", "temperature": args.temperature, "top_p": args.top_p})
        chosen = sampling(asked, engine.manifest.generation)
        handle = engine.submit(ids, min(args.max_tokens or room, room), seed=args.seed, **chosen)
        shown = any(engine.tokenizer.special_token(tag) is not None for tag in (self._tags.open, self._tags.close))
        stream = TextStream(engine.tokenizer, context=ids, skip_special_tokens=not shown)
        splitter = Splitter(self._tags, inside=prompt.rstrip().endswith(self._tags.open), once=True)
        try:
            for event in handle:
                if event.has_token and event.finish_reason != "eos":
                    for inside, text, _ in splitter.push(stream.push(event.token)):
                        yield ("reasoning_content" if inside else "content"), text
            for inside, text, _ in splitter.push(stream.flush()):
                yield ("reasoning_content" if inside else "content"), text
            for inside, text in splitter.flush():
                yield ("reasoning_content" if inside else "content"), text
        finally:
            handle.cancel()


class _Remote:
    """A server of OpenAI's interface."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._base = args, args.url.rstrip("/")
        if not re.fullmatch(r"https?://[^/]+(/.*)?", self._base):
            raise ServerError("the server's address", expected="such as http://127.0.0.1:8080/v1", found=args.url[:200])
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
