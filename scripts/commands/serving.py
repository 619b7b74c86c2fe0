"""package, serve, generate: from an engine folder to text. Needs no torch."""

import argparse
import contextlib
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ngpt.errors import PackagingError, ServerError
from scripts.commands.options import Command, add_text, gpu_numbers, port, positive
from scripts.commands.partners import message_prompt, served_model, template_of
from scripts.commands.talking import add_frontend, settings_of
from scripts.terminal import harmless
from triton_repo.interface import TEXT, Input, options


def add_package(command: Command) -> None:
    """`ngpt-deploy package`."""
    package = command("package", _package, "Package an engine as a Triton model repository; the engine's runtime decides which.")
    package.add_argument(
        "engine", type=Path, help="engine folder; or a Hugging Face checkpoint, for TensorRT-LLM's PyTorch runtime"
    )
    package.add_argument("--output", type=Path, required=True, help="model repository to make; must not exist")
    add_text(package)
    package.add_argument("--slots", type=positive, default=8, help="sequences generated at once")
    package.add_argument(
        "--max-queue", type=positive, help="requests that may wait for a slot, 256 if not given; more are refused"
    )
    package.add_argument(
        "--prefill-chunk", type=positive, help="most tokens of a prompt that are read in one step; 256 if not given"
    )
    package.add_argument("--threads", type=positive, help="threads of the runtime; its own choice if not given")
    package.add_argument(
        "--exclude-input-in-output",
        action="store_true",
        help="leave the prompt out of answers that are not streamed, unless a request says otherwise",
    )
    package.add_argument(
        "--no-special-tokens",
        action="store_true",
        help="the tokenizer adds no bos to prompts (rendered chat templates have theirs) unless a request says otherwise",
    )
    package.add_argument("--chat-template", type=Path, metavar="FILE", help="in place of the tokenizer's own")
    package.add_argument("--name", help="of the model that holds the engine, so that one server can have several")
    package.add_argument("--model-version", type=positive, help="number of the version's folder; 1 if not given")
    package.add_argument(
        "--instances", type=positive, help="processes that each hold the engine (with --gpus: on each); 1 if not given"
    )
    package.add_argument(
        "--gpus", type=gpu_numbers, help="GPUs that instances run on, such as 0,1; the runtime's choice if not given"
    )
    package.add_argument("--mount", help="TensorRT-LLM engines: path of the repository where it is served; /models if not given")
    package.add_argument(
        "--kv-cache-fraction", type=float, help="TensorRT-LLM: part of free GPU memory for the cache; 0.9 if not given"
    )
    package.add_argument("--tp", type=positive, help="checkpoints: GPUs that share the model; 1 if not given")
    package.add_argument("--module", type=Path, action="append", default=[], help="checkpoints: file that registers the model")
    package.add_argument("--allow-unverified", action="store_true", help="package an engine without a passing verdict")
    package.add_argument(
        "--require-signature",
        type=Path,
        metavar="KEY",
        help="public key in PEM: refuse an engine without a passing verdict that its private half signed (`verify --sign`)",
    )


def add_serve(command: Command) -> None:
    """`ngpt-deploy serve`."""
    serve = command("serve", _serve, "Serve a model repository with the pip-installed Triton server on 127.0.0.1.")
    serve.add_argument("repository", type=Path, help="model repository that `package` made")
    serve.add_argument("--http-port", type=port, default=8000, help="0: any free one, as for the two below")
    serve.add_argument("--grpc-port", type=port, default=8001, help="the one that `generate --url` wants")
    serve.add_argument("--metrics-port", type=port, default=8002, help="Prometheus metrics")
    serve.add_argument(
        "--stop-timeout", type=positive, default=30, help="seconds that requests in flight get after SIGTERM or Ctrl-C"
    )
    serve.add_argument(
        "--server-argument",
        action="append",
        default=[],
        metavar="--NAME=VALUE",
        help="handed to tritonserver as it is, such as --server-argument=--model-control-mode=explicit; may be given again",
    )
    serve.add_argument("--openai-port", type=port, help="OpenAI's interface on this port, too; 0: any free one")
    serve.add_argument("--openai-host", default="127.0.0.1", help="address for it; one that others reach wants --api-key")
    serve.add_argument("--log", type=Path, help="file for the server's log; a temporary one if not given")
    add_frontend(serve)


def add_generate(command: Command) -> None:
    """`ngpt-deploy generate`."""
    generate = command("generate", _generate, "Stream a completion from a server (--url) or from an engine folder (--engine).")
    generate.add_argument("prompt", help="text to continue")
    where = generate.add_mutually_exclusive_group()
    where.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC endpoint")
    where.add_argument("--engine", type=Path, help="engine folder, run in this process")
    generate.add_argument("--chat", action="store_true", help="the prompt is a message, for the model's chat template")
    generate.add_argument("--repository", type=Path, help="with --chat and --url: what the server serves, for its chat template")
    generate.add_argument("--max-tokens", type=int, default=64, help="most tokens to generate")
    sampling = generate.add_argument_group("sampling", "Greedy, unless one of temperature, top-k, top-p and min-p is given.")
    for row in _sampling():
        kind = float if row.dtype() == "FP32" else int
        sampling.add_argument(f"--{row.option.replace('_', '-')}", type=kind, metavar="N", help=row.about)


def _package(args: argparse.Namespace) -> int:
    # An engine has a config.json too; one that lost its manifest is still no checkpoint.
    a_checkpoint = (args.engine / "config.json").is_file() and not (args.engine / "genai_config.json").is_file()
    if a_checkpoint and not (args.engine / "manifest.json").is_file():
        from triton_repo.llmapi import package_checkpoint

        of_engines = ("threads", "mount", "max_queue", "prefill_chunk", "name", "model_version", "instances", "gpus")
        _refuse(
            args,
            "of an engine",
            *of_engines,
            "exclude_input_in_output",
            "no_special_tokens",
            "chat_template",
            "require_signature",
        )
        package_checkpoint(
            args.engine,
            args.output,
            allow_unverified=args.allow_unverified,
            num_slots=args.slots,
            modules=args.module,
            tensor_parallel=args.tp or 1,
            kv_cache_fraction=args.kv_cache_fraction,
            tokenizer=args.tokenizer,
            eos=args.eos,
        )
        print(f"repository {args.output}\nserve it   in the vendor's container: docs/serving.md")
        return 0
    from triton_repo.package import package_engine

    _refuse(args, "of a checkpoint", "tp", "module")
    package_engine(
        args.engine,
        args.output,
        allow_unverified=args.allow_unverified,
        num_slots=args.slots,
        max_queue=256 if args.max_queue is None else args.max_queue,
        prefill_chunk=args.prefill_chunk,
        threads=args.threads,
        mount=args.mount,
        kv_cache_fraction=args.kv_cache_fraction,
        tokenizer=args.tokenizer,
        eos=args.eos,
        exclude_input_in_output=args.exclude_input_in_output,
        add_special_tokens=not args.no_special_tokens,
        chat_template=args.chat_template,
        require_signature=args.require_signature,
        name=args.name,
        model_version=args.model_version,
        instances=args.instances,
        gpus=args.gpus or (),
    )
    where = (
        "in the vendor's container: docs/serving.md"
        if (args.output / "tensorrt_llm_bls").is_dir()
        else f"ngpt-deploy serve {args.output}"
    )
    print(f"repository {args.output}\nserve it   {where}")
    return 0


def _refuse(args: argparse.Namespace, of: str, *names: str) -> None:
    """Raise PackagingError for an option that would not be looked at."""
    for name in names:
        if getattr(args, name) not in (None, [], False):
            raise PackagingError(
                f"--{name.replace('_', '-')} is an option {of}, which {args.engine} is not", remedy="leave it out"
            )


def _serve(args: argparse.Namespace) -> int:
    from triton_repo.openai.run import Frontend
    from triton_repo.server import TritonServer

    ports = {"http_port": args.http_port, "grpc_port": args.grpc_port, "metrics_port": args.metrics_port}
    limits = {"stop_timeout": args.stop_timeout, "arguments": args.server_argument}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(TritonServer(args.repository, log_path=args.log, **limits, **ports))
        frontend = None
        if args.openai_port is not None:
            # Left first: what it has begun is answered by the server behind it.
            frontend = stack.enter_context(Frontend(settings_of(args, server.grpc_url, args.openai_port, args.openai_host), _say))
        print(
            f"gRPC 127.0.0.1:{server.grpc_port}  HTTP 127.0.0.1:{server.http_port}  metrics 127.0.0.1:{server.metrics_port}",
            flush=True,
        )
        if frontend is not None:
            print(f"OpenAI {frontend.base_url}", flush=True)
        print("press Ctrl-C to stop", flush=True)
        try:
            server.watch(_say)
        except KeyboardInterrupt:  # SIGTERM, with which a service manager stops us, too: this is how serving ends
            print("stopping", file=sys.stderr)
    return 0


def _say(said: str) -> None:
    print(f"ngpt-deploy serve: {said}", file=sys.stderr, flush=True)


def _generate(args: argparse.Namespace) -> int:
    given = {row: value for row in _sampling() if (value := getattr(args, row.option)) is not None}
    params = {row.sets: value for row, value in given.items()}
    _check(args.max_tokens, params)  # before gigabytes are read, or anything is sent
    if args.engine is not None:
        from engines import load_engine

        with load_engine(args.engine) as engine:
            prompt = args.prompt if not args.chat else message_prompt(template_of(args.engine), args.prompt)
            _stream(engine.stream_text(prompt, args.max_tokens, add_special_tokens=not args.chat, **params))
    else:
        from triton_repo.client import stream_text

        asked = {row.option: value for row, value in given.items()}
        prompt = args.prompt
        if args.chat:
            if args.repository is None:
                raise ServerError("--chat", expected="--repository, which has the template", found="--url alone")
            model = served_model(args.repository)
            prompt = message_prompt(model.template, prompt)
            asked |= {"model": model.served, "add_special_tokens": False}
        _stream(stream_text(args.url, prompt, max_tokens=args.max_tokens, **asked))
    return 0


def _sampling() -> list[Input]:
    """The options of the request interface that choose tokens."""
    rows = options(TEXT).values()
    return [row for row in rows if row.sets and not row.asks and row.option != "max_tokens"]


def _check(max_tokens: int, options: dict[str, Any]) -> None:
    from engines.runtime.errors import RequestError
    from engines.runtime.sampling import SamplingParams

    try:
        SamplingParams.from_options(max_new_tokens=max_tokens, **options)
    except RequestError as error:
        error.what = error.what.replace("max_new_tokens", "max_tokens")  # as the command calls it
        raise


def _stream(pieces: Generator[str, None, None] | Any) -> None:
    """Print the pieces as they come; when nobody reads them any more, generating ends too."""
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    with contextlib.closing(pieces):
        for piece in pieces:
            print(harmless(piece) if on_terminal else piece, end="", flush=True)
    print()
