"""`ngpt-deploy`: plan, build, verify, package, serve, generate, inspect, convert, bench."""

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engines.runtime.errors import ServingError
from engines.target import AUTO, DEFAULT, load_target, target_names, with_kv_cache
from ngpt.errors import NGPTDeployError, ParityFailedError

EPILOG = """examples:
  ngpt-deploy build --checkpoint examples/ngpt-tiny --target cpu-int8 --output build/engine
  ngpt-deploy verify build/engine --checkpoint examples/ngpt-tiny
  ngpt-deploy package build/engine --output build/models
  ngpt-deploy serve build/models
  ngpt-deploy generate "def main():" --url 127.0.0.1:8001

Errors name the thing, what was expected, what was found and what to do; the exit code is then 2 (3: parity failed)."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """With defaults, and with names such as onnx-portable kept in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="ngpt-deploy",
        description="From an nGPT checkpoint to a verified engine in a Triton model repository.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, formatter_class=Help)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error")
        sub.set_defaults(function=function)
        return sub

    off_sphere = (
        "take a checkpoint as it is whose rows are far from unit norm; a deviation of up to 0.005 is taken with a warning"
    )
    targets = "; ".join(f"{name}: {load_target(name).description}" for name in target_names())
    build = command("build", _build, "Build the engine of a checkpoint for a target and verify it against PyTorch.")
    build.add_argument("--checkpoint", required=True, help="Hugging Face directory, or the research code's ckpt.pt")
    build.add_argument("--target", default=DEFAULT, help=f"{targets}; {AUTO}: that of this machine's GPU, else {DEFAULT}")
    build.add_argument(
        "--precision", help="another one that the target offers (TensorRT targets: fp16, bf16, fp32, int8, fp8, int4)"
    )
    build.add_argument("--allow-off-sphere", action="store_true", help=off_sphere)
    build.add_argument("--output", required=True, help="engine folder to make; must not exist")
    build.add_argument("--name", help="name in the manifest; the checkpoint folder's if not given")
    build.add_argument("--no-verify", action="store_true", help="skip parity; the packager will then refuse the engine")
    build.add_argument("--tp", type=int, default=1, help="cards a layer is divided among (TensorRT-LLM targets)")
    build.add_argument("--pp", type=int, default=1, help="cards the layers are divided among (TensorRT-LLM targets)")
    cache = "type of cached keys and values; auto: the arithmetic's own (fp8: TensorRT-LLM targets)"
    build.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto", help=cache)
    build.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing (TensorRT-LLM targets)")

    plan = command("plan", _plan, "Compute the GPUs, memory and highest decode rate of a model under a load, before building.")
    plan.add_argument("--checkpoint", help="Hugging Face directory, ckpt.pt, or a config.json alone; the 8B model if not given")
    plan.add_argument("--target", default="h100", help="one with a GPU: " + ", ".join(_gpu_targets()))
    plan.add_argument("--precision", help="another one that the target offers")
    plan.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto", help=cache)
    plan.add_argument("--concurrency", type=_positive, default=1, help="sequences at once")
    plan.add_argument("--context", type=_positive, help="tokens of each, prompt included; the model's maximum if not given")
    plan.add_argument("--tp", type=_positive, help="tensor-parallel degree; the smallest that fits if not given")
    plan.add_argument("--json", action="store_true", help="print JSON: bytes, and tokens per second")

    verify = command("verify", _verify, "Compare an engine with PyTorch on its checkpoint and write the report.")
    verify.add_argument("engine", type=Path)
    verify.add_argument("--checkpoint", required=True)
    verify.add_argument(
        "--decode-steps",
        type=_positive,
        help="teacher-forced decode steps per prompt; 64, or half the model's length, if not given",
    )
    verify.add_argument(
        "--report", type=Path, help="folder for parity.json and parity.html; a new one beside the engine if not given"
    )

    package = command("package", _package, "Package an engine as a Triton model repository; the engine's runtime decides which.")
    package.add_argument(
        "engine", type=Path, help="engine folder; or a Hugging Face checkpoint, for TensorRT-LLM's PyTorch runtime"
    )
    package.add_argument("--output", type=Path, required=True, help="model repository to make; must not exist")
    package.add_argument("--slots", type=_positive, default=8, help="sequences generated at once")
    package.add_argument("--threads", type=_positive, help="threads of the runtime; its own choice if not given")
    package.add_argument("--mount", default="/models", help="TensorRT-LLM engines: path of the repository where it is served")
    package.add_argument(
        "--kv-cache-fraction", type=float, default=0.9, help="TensorRT-LLM: part of free GPU memory for the cache"
    )
    package.add_argument("--tp", type=_positive, default=1, help="checkpoints: GPUs that share the model")
    package.add_argument("--module", type=Path, action="append", default=[], help="checkpoints: file that registers the model")
    package.add_argument("--allow-unverified", action="store_true", help="package an engine without a passing verdict")

    serve = command("serve", _serve, "Serve a model repository with the pip-installed Triton server on 127.0.0.1.")
    serve.add_argument("repository", type=Path)
    serve.add_argument("--http-port", type=int, default=8000)
    serve.add_argument("--grpc-port", type=int, default=8001)
    serve.add_argument("--metrics-port", type=int, default=8002)
    serve.add_argument("--log", type=Path, help="file for the server's log")

    generate = command("generate", _generate, "Stream a completion from a server (--url) or from an engine folder (--engine).")
    generate.add_argument("prompt")
    where = generate.add_mutually_exclusive_group()
    where.add_argument("--url", default="127.0.0.1:8001", help="host:port of the server's gRPC endpoint")
    where.add_argument("--engine", type=Path, help="engine folder, run in this process")
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, help="sample at this temperature; greedy if no sampling option is given")
    generate.add_argument("--top-k", type=int)
    generate.add_argument("--top-p", type=float)
    generate.add_argument("--seed", type=int)

    inspect = command("inspect", _inspect, "Tell what an engine was built from, for what, and whether it is verified.")
    inspect.add_argument("engine", type=Path)
    inspect.add_argument("--json", action="store_true", help="print the manifest itself")
    inspect.add_argument(
        "--on",
        metavar="CARD",
        help="say whether it would load there: a target's name, a compute capability such as 8.9, or 'here'",
    )

    convert = command("convert", _convert, "Write a checkpoint of either format as a Hugging Face directory, exactly.")
    convert.add_argument("--checkpoint", required=True)
    convert.add_argument("--output", required=True)
    convert.add_argument(
        "--fold-scales", action="store_true", help="fold sz into lm_head, for engines that apply lm_head themselves (vLLM)"
    )
    convert.add_argument(
        "--normalize", action="store_true", help="project matrices back onto the unit sphere, and say what that changed"
    )
    convert.add_argument("--allow-off-sphere", action="store_true", help=off_sphere)
    convert.add_argument("--with-code", action="store_true", help="add the model's code, for trust_remote_code=True")

    bench = command("bench", _bench, "Measure engines against their peers: ratios of medians, contenders interleaved.")
    bench.add_argument("--checkpoint", default="examples/ngpt-tiny")
    bench.add_argument("--rounds", type=_positive, default=5)
    return top


def _gpu_targets() -> list[str]:
    return [name for name in target_names() if load_target(name).gpu is not None]


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value


class Bar:
    """A progress bar that says what is being done."""

    def __init__(self) -> None:
        from tqdm import tqdm

        layout = "{percentage:3.0f}%|{bar:30}| {desc}"
        self._bar = tqdm(total=1.0, bar_format=layout, disable=None if sys.stderr.isatty() else True)

    def __call__(self, what: str, done: float) -> None:
        self._bar.set_description_str(what, refresh=False)
        self._bar.update(max(0.0, done - self._bar.n))

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _build(args: argparse.Namespace) -> int:
    from engines.build import build_engine

    if args.dry_run:
        return _dry_run(args)
    with Bar() as bar:
        folder = build_engine(
            args.checkpoint, args.target, args.output, precision=args.precision, name=args.name, verify=not args.no_verify,
            tp=args.tp, pp=args.pp, kv_cache=args.kv_cache, off_sphere=_off_sphere(args), progress=bar,
        )  # fmt: skip
    if not (folder / "manifest.json").exists():  # TensorRT-LLM is not installed here
        print(f"checkpoint {folder / 'checkpoint'}\n")
        print((folder / "BUILD.md").read_text(encoding="utf-8"), end="")
        return 0
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    print(f"engine   {folder}, target {manifest['target']['name']}, {manifest['target']['precision']}")
    _print_verdict(manifest, folder)
    if (manifest["parity"] or {}).get("verdict") == "fail":
        raise ParityFailedError(
            f"{folder} does not agree with PyTorch", expected="verdict pass", found="fail",
            remedy=f"open {folder / 'parity.html'} to see where they part ways",
        )  # fmt: skip
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    from engines.trtllm import dry_run
    from export.trtllm.parallel import Parallel
    from ngpt.errors import TargetError

    target = load_target(args.target, args.precision)
    if target.runtime != "tensorrt_llm":
        raise TargetError("--dry-run", expected="a TensorRT-LLM target", found=target.name)
    target = with_kv_cache(target, args.kv_cache)
    print(dry_run(args.checkpoint, target, Path(args.output), Parallel(args.tp, args.pp)))
    return 0


def _print_verdict(manifest: dict[str, Any], folder: Path) -> None:
    parity = manifest["parity"]
    if parity is None:
        print(f"parity   not verified{': ' + manifest['target']['note'] if manifest['target']['note'] else ''}")
    else:
        print(f"parity   {parity['verdict']}  (report: {folder / parity['html']})")


def _plan(args: argparse.Namespace) -> int:
    from engines.capacity import plan_capacity, read_spec

    spec = read_spec(args.checkpoint)
    target = with_kv_cache(load_target(args.target, args.precision), args.kv_cache)
    found = plan_capacity(spec, target, args.concurrency, args.context or spec.max_length, args.tp)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.table())
    return 0


def _verify(args: argparse.Namespace) -> int:
    from engines.build import verify_folder
    from ngpt.checkpoint import open_checkpoint

    report = args.report or args.engine.with_name(args.engine.name + "-parity")
    with open_checkpoint(args.checkpoint) as checkpoint:
        summary = verify_folder(args.engine, checkpoint, decode_steps=args.decode_steps, report=report)
    print(json.dumps(summary, indent=2))
    print(f"parity   {summary['verdict']}  (report: {report / 'parity.html'})")
    if summary["verdict"] != "pass":
        raise ParityFailedError(f"{args.engine} does not agree with PyTorch", expected="verdict pass", found=summary["verdict"])
    return 0


def _package(args: argparse.Namespace) -> int:
    if not (args.engine / "manifest.json").is_file() and (args.engine / "config.json").is_file():
        from triton_repo.llmapi import package_checkpoint

        package_checkpoint(
            args.engine, args.output, allow_unverified=args.allow_unverified, num_slots=args.slots, modules=args.module,
            tensor_parallel=args.tp, kv_cache_fraction=args.kv_cache_fraction,
        )  # fmt: skip
        print(f"repository {args.output}\nserve it   in the vendor's container: docs/serving.md")
        return 0
    from triton_repo.package import package_engine

    package_engine(
        args.engine, args.output, allow_unverified=args.allow_unverified, num_slots=args.slots, threads=args.threads,
        mount=args.mount, kv_cache_fraction=args.kv_cache_fraction,
    )  # fmt: skip
    where = (
        "in the vendor's container: docs/serving.md"
        if (args.output / "tensorrt_llm_bls").is_dir()
        else f"ngpt-deploy serve {args.output}"
    )
    print(f"repository {args.output}\nserve it   {where}")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from triton_repo.server import TritonServer

    # A service manager's SIGTERM must stop the server we started, like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ports = {"http_port": args.http_port, "grpc_port": args.grpc_port, "metrics_port": args.metrics_port}
    with TritonServer(args.repository, log_path=args.log, **ports) as server:
        print(
            f"gRPC 127.0.0.1:{server.grpc_port}  HTTP 127.0.0.1:{server.http_port}  metrics 127.0.0.1:{server.metrics_port}",
            flush=True,
        )
        print("press Ctrl-C to stop", flush=True)
        try:
            server.wait()
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)
    return 0


def _generate(args: argparse.Namespace) -> int:
    options = {k: v for k in ("temperature", "top_k", "top_p", "seed") if (v := getattr(args, k)) is not None}
    if args.engine is not None:
        from engines import load_engine

        with load_engine(args.engine) as engine:
            _stream(engine.stream_text(args.prompt, max_new_tokens=args.max_tokens, **options))
    else:
        from triton_repo.client import stream_text

        _stream(stream_text(args.url, args.prompt, max_tokens=args.max_tokens, **options))
    return 0


def _stream(pieces: Any) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _inspect(args: argparse.Namespace) -> int:
    from engines.runtime.manifest import read_manifest

    checked = read_manifest(args.engine)  # refuses a damaged one
    manifest = json.loads((args.engine / "manifest.json").read_text(encoding="utf-8"))
    if args.json:
        print(json.dumps(manifest, indent=2))
        return 0
    target, model, flags = manifest["target"], manifest["model"], manifest["flags"]
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"engine   {manifest['name']}, built {manifest['created']}, {size / 1e6:.1f} MB in {len(manifest['files'])} files")
    where = ", ".join(target["providers"][:1]) or f"compute capability {flags.get('compute_capability') or 'any'}"
    print(f"target   {target['name']}: {target['runtime']}, {target['precision']}, {where}, cache {target['cache']}")
    sizes = f"{model['num_layers']} layers, hidden {model['hidden_size']}, {model['num_heads']}/{model['num_kv_heads']} heads"
    print(f"model    {sizes} of {model['head_dim']}, vocabulary {model['vocab_size']}, up to {model['max_length']} tokens")
    for name, digest in manifest["digests"].items():
        print(f"{name:8} {digest}")
    print("tools    " + ", ".join(f"{name} {version}" for name, version in manifest["tools"].items()))
    _print_verdict(manifest, args.engine)
    return 0 if args.on is None else _tell_whether_it_loads(checked, args.on)


def _tell_whether_it_loads(manifest: Any, card: str) -> int:
    """Print what keeps an engine from running on a card; 0 if nothing does, else 2. No GPU is touched."""
    from engines.device import place
    from engines.runtime.compatibility import problems

    where = place(card)
    version = _installed_version(manifest.target.runtime) if card == "here" else None
    found = problems(
        manifest,
        tensorrt_version=version,
        compute_capability=where.compute_capability,
        memory_bytes=where.memory_bytes or None,
    )
    print(f"on       {where.name}: " + ("nothing in the manifest speaks against it" if not found else "would not load"))
    for problem in found:
        print(f"         {problem}")
    return 2 if found else 0


def _installed_version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def _convert(args: argparse.Namespace) -> int:
    from scripts.convert import run

    run(
        args.checkpoint, args.output, fold=args.fold_scales, project=args.normalize, off_sphere=_off_sphere(args),
        with_code=args.with_code,
    )  # fmt: skip
    return 0


def _off_sphere(args: argparse.Namespace) -> Any:
    return "allow" if args.allow_off_sphere else "refuse"


def _bench(args: argparse.Namespace) -> int:
    from scripts.bench import run

    run(Path(args.checkpoint), args.rounds)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for an error, 3 for a failed parity."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args = parser().parse_args(argv)
    if logging.lastResort is not None:  # notes on a checkpoint, one line each
        logging.lastResort.setFormatter(logging.Formatter("ngpt-deploy: warning: %(message)s"))
    try:
        return int(args.function(args))
    except (NGPTDeployError, ServingError) as error:
        if args.debug:
            raise
        print(f"ngpt-deploy {args.command}: {error}", file=sys.stderr)
        return 3 if isinstance(error, ParityFailedError) else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
