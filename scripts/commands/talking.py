"""openai, chat: a served model by OpenAI's interface, and in the terminal."""

import argparse
import contextlib
import os
from pathlib import Path

from ngpt.errors import ServerError
from scripts.commands.options import Command, port, positive
from triton_repo.openai.run import KEYS_VARIABLE, Settings, is_local
from triton_repo.openai.tags import Tags


def add_openai(command: Command) -> None:
    """`ngpt-deploy openai`."""
    openai = command("openai", _openai, "Put OpenAI's interface in front of a Triton server that serves a repository of ours.")
    openai.add_argument("repository", type=Path, help="the repository that is served: for its tokenizer and chat template")
    openai.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC endpoint")
    openai.add_argument("--port", type=port, default=8080, help="0: any free one")
    openai.add_argument("--host", default="127.0.0.1", help="address to listen on; one that others reach wants --api-key")
    add_frontend(openai)


def add_frontend(command: argparse.ArgumentParser) -> None:
    """Options of the frontend, for `serve --openai-port` too."""
    group = command.add_argument_group("OpenAI's interface")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        help=f"ask clients for this key; may be given again. Better in the environment, as {KEYS_VARIABLE}: others see arguments",
    )
    group.add_argument("--model-name", help="the name that clients ask for; Triton's own if not given")
    group.add_argument("--chat-template", type=Path, metavar="FILE", help="in place of the tokenizer's own")
    for name, what in (
        ("reasoning", "a model's reasoning, which becomes reasoning_content"),
        ("tool-call", "its calls of tools"),
    ):
        group.add_argument(f"--{name}-tags", nargs=2, metavar=("OPEN", "CLOSE"), help=f"tags around {what}")
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN", help="pages in browsers that may ask; none if not given"
    )
    group.add_argument("--max-body-mb", type=positive, default=16, help="largest request")


def settings_of(args: argparse.Namespace, url: str, listen: int, host: str = "127.0.0.1") -> Settings:
    """What the options say. Raises ServerError for an interface without a key that other machines reach."""
    keys = [*args.api_key, *(key for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key)]
    if not keys and not is_local(host):
        raise ServerError(
            f"whoever reaches {host} could use the model",
            expected="a key for clients",
            found="none",
            remedy=f"set {KEYS_VARIABLE} in the environment, or listen on 127.0.0.1",
        )
    return Settings(
        args.repository,
        url,
        host=host,
        port=listen,
        keys=keys,
        origins=args.allow_origin,
        model_name=args.model_name,
        chat_template=args.chat_template,
        reasoning=None if args.reasoning_tags is None else Tags(*args.reasoning_tags),
        tool_calls=None if args.tool_call_tags is None else Tags(*args.tool_call_tags),
        max_body_mb=args.max_body_mb,
    )


def _openai(args: argparse.Namespace) -> int:
    from triton_repo.client import check_url
    from triton_repo.machine import free_ports
    from triton_repo.openai.run import run

    check_url(args.url)
    settings = settings_of(args, args.url, args.port or free_ports()[0], args.host)
    print(f"OpenAI {settings.base_url}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # SIGTERM, too: this is how serving ends, its requests answered
        run(settings)
    return 0
