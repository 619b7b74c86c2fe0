"""chat: a conversation in the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from ngpt.errors import NGPTDeployError
from scripts.commands.options import Command, positive
from scripts.commands.partners import Local, Message, Partner, Piece, Remote, Served, template_of
from scripts.signals import Terminated
from scripts.terminal import harmless, plain

HELP = "/reset: forget what was said   /system TEXT: what the model is to be   /retry: the last answer again   /quit"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def add_chat(command: Command) -> None:
    """`ngpt-deploy chat`."""
    chat = command("chat", _chat, "Talk with a model in the terminal. Ctrl-C stops an answer, /quit or Ctrl-D ends.")
    where = chat.add_mutually_exclusive_group()
    where.add_argument(
        "--url",
        help="of OpenAI's interface, which `serve --openai-port` prints; http://127.0.0.1:8080/v1 if not given. "
        "With --repository: host:port of Triton's gRPC endpoint; 127.0.0.1:8001 if not given",
    )
    where.add_argument("--engine", type=Path, help="engine folder, run in this process; its tokenizer has a chat template")
    chat.add_argument("--repository", type=Path, help="ask Triton itself, which serves this repository: for its chat template")
    chat.add_argument("--model", help="the server's model; its first if not given")
    own = chat.add_argument_group("with --engine or --repository")
    own.add_argument("--chat-template", type=Path, metavar="FILE", help="in place of the tokenizer's own")
    own.add_argument("--reasoning-tags", nargs=2, metavar=("OPEN", "CLOSE"), help="<think> and </think> if not given")
    chat.add_argument(
        "--no-thinking", action="store_true", help="ask the template for an answer without reasoning (enable_thinking)"
    )
    chat.add_argument("--system", help="what the model is to be")
    chat.add_argument("--max-tokens", type=positive, help="most tokens of an answer; what fits if not given")
    for name in ("temperature", "top-p"):
        chat.add_argument(f"--{name}", type=float, metavar="N", help="as the model has it if not given")
    chat.add_argument("--seed", type=int, metavar="N")


def _chat(args: argparse.Namespace) -> int:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # edits and remembers what is typed
    with contextlib.ExitStack() as stack:
        model: Partner
        if args.engine is not None:
            from engines import load_engine

            _refuse(args, "of a server", "repository", "model")
            template = template_of(args.engine, args.chat_template)
            model = Local(stack.enter_context(load_engine(args.engine, num_slots=1)), template, args)
        elif args.repository is not None:
            model = Served(args)
        else:
            _refuse(args, "for --engine and --repository", "chat_template", "reasoning_tags")
            model = Remote(args)
        print(f"{model.name}. {HELP}", file=sys.stderr)
        _converse(model, args.system)
    return 0


def _refuse(args: argparse.Namespace, of: str, *names: str) -> None:
    """Raise NGPTDeployError for an option that would not be looked at."""
    for name in names:
        if getattr(args, name) is not None:
            raise NGPTDeployError(f"--{name.replace('_', '-')} is an option {of}", remedy="leave it out")


def _converse(model: Partner, system: str | None) -> None:
    """Read, answer, remember."""
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\n/quit or Ctrl-D ends", file=sys.stderr)
            continue
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
    from engines.runtime.errors import ServingError  # not before: the package needs NumPy, and --help does not

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
    except (NGPTDeployError, ServingError, ValueError) as error:  # of a request, or of the template; what follows may be good
        print(plain(error), file=sys.stderr)
    print(PLAIN if dimmed else "")
    return text
