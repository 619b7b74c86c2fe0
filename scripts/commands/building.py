"""build, convert, bench: what reads the weights, and so needs torch."""

import argparse
import json
from pathlib import Path
from typing import Any

from engines.target import AUTO, DEFAULT, Target, with_kv_cache
from ngpt.errors import BuildError
from scripts.commands.options import Bar, Command, add_text, positive
from scripts.commands.verifying import conclude
from scripts.terminal import plain

OFF_SPHERE = "take a checkpoint as it is whose rows are far from unit norm; a deviation of up to 0.5 %% is taken with a warning"
KV_CACHE = "type of cached keys and values; auto: the arithmetic's own (fp8: TensorRT-LLM targets)"


def add_build(command: Command, targets: list[Target]) -> None:
    """`ngpt-deploy build`."""
    described = "; ".join(f"{target.name}: {target.description}" for target in targets).replace("%", "%%")
    build = command("build", _build, "Build the engine of a checkpoint for a target and verify it against PyTorch.")
    build.add_argument("--checkpoint", required=True, help="Hugging Face directory, or the research code's ckpt.pt")
    build.add_argument(
        "--target",
        default=DEFAULT,
        help=f"a name, or the path of a target's file of your own (.toml). {described}; "
        f"{AUTO}: that of this machine's GPU, else {DEFAULT}",
    )
    build.add_argument(
        "--precision", help="another one that the target offers (TensorRT targets: fp16, bf16, fp32, int8, fp8, int4)"
    )
    add_text(build)
    build.add_argument("--allow-off-sphere", action="store_true", help=OFF_SPHERE)
    build.add_argument("--output", help="engine folder to make; must not exist. Needed unless there is a --store")
    build.add_argument(
        "--store",
        metavar="DIR",
        help="folder of engines by what they are made of (ngpt-deploy store): one of the same checkpoint, target, options, code "
        "and library versions is taken from there, and one that is built is kept there. --output gets a copy",
    )
    build.add_argument(
        "--explain",
        action="store_true",
        help="with --store: say whether the engine is there or, if not, in what it differs from the nearest; build nothing",
    )
    build.add_argument(
        "--resume",
        action="store_true",
        help="continue where a killed build of the same engine to the same place stopped, and leave what is complete for the "
        "next one (ONNX weights from 64 MB on, TensorRT-LLM conversions)",
    )
    build.add_argument("--name", help="name in the manifest; the checkpoint folder's if not given")
    build.add_argument("--no-verify", action="store_true", help="skip parity; the packager will then refuse the engine")
    build.add_argument("--tp", type=int, default=1, help="cards a layer is divided among (TensorRT-LLM targets)")
    build.add_argument("--pp", type=int, default=1, help="cards the layers are divided among (TensorRT-LLM targets)")
    build.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto", help=KV_CACHE)
    build.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done and how much memory the engine would take, and write nothing",
    )


def add_convert(command: Command) -> None:
    """`ngpt-deploy convert`."""
    convert = command("convert", _convert, "Write a checkpoint of either format as a Hugging Face directory, exactly.")
    convert.add_argument("--checkpoint", required=True, help="Hugging Face directory, or the research code's ckpt.pt")
    convert.add_argument("--output", required=True, help="directory to make; may be there if it is empty")
    convert.add_argument(
        "--fold-scales", action="store_true", help="fold sz into lm_head, for engines that apply lm_head themselves (vLLM)"
    )
    convert.add_argument(
        "--normalize", action="store_true", help="project matrices back onto the unit sphere, and say what that changed"
    )
    add_text(convert)
    convert.add_argument("--allow-off-sphere", action="store_true", help=OFF_SPHERE)
    convert.add_argument("--with-code", action="store_true", help="add the model's code, for trust_remote_code=True")


def add_bench(command: Command) -> None:
    """`ngpt-deploy bench`."""
    bench = command("bench", _bench, "Measure engines against their peers: ratios of medians, contenders interleaved.")
    bench.add_argument(
        "--checkpoint", default="examples/ngpt-tiny", help="Hugging Face directory, or the research code's ckpt.pt"
    )
    bench.add_argument("--rounds", type=positive, default=5, help="times that each contender is measured")


def _build(args: argparse.Namespace) -> int:
    from engines.build import build_engine

    if args.output is None and args.store is None:
        raise BuildError("there is no place for the engine", expected="--output, --store, or both")
    if args.explain:
        return _explain(args)
    if args.dry_run:
        return _dry_run(args)
    with Bar() as bar:
        folder = build_engine(
            args.checkpoint,
            args.target,
            args.output,
            precision=args.precision,
            name=args.name,
            verify=not args.no_verify,
            tp=args.tp,
            pp=args.pp,
            kv_cache=args.kv_cache,
            store=args.store,
            resume=args.resume,
            progress=bar,
            **_opening(args),
        )
    if not (folder / "manifest.json").exists():  # TensorRT-LLM is not installed here
        print(f"checkpoint {folder / 'checkpoint'}\n")
        print((folder / "BUILD.md").read_text(encoding="utf-8"), end="")
        return 0
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    print(f"engine   {folder}, target {manifest['target']['name']}, {manifest['target']['precision']}")
    parity = manifest["parity"]
    if parity is None:
        note = manifest["target"]["note"]
        print(f"parity   not verified{f': {plain(note)}' if note else ''}")
    else:
        conclude(folder, parity["verdict"], folder / parity["html"])
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    from engines.build import choose_target, dry_run
    from export.trtllm.parallel import Parallel

    target = with_kv_cache(choose_target(args.target, args.precision), args.kv_cache)
    output = Path(args.output or Path(args.store) / "KEY" / "engine")
    print(dry_run(args.checkpoint, target, output, Parallel(args.tp, args.pp), **_opening(args)))
    return 0


def _explain(args: argparse.Namespace) -> int:
    from engines.build import choose_target, engine_parts
    from engines.store import explain
    from export.trtllm.parallel import Parallel

    if args.store is None:
        raise BuildError("--explain compares with a store", expected="--store DIR")
    target = with_kv_cache(choose_target(args.target, args.precision), args.kv_cache)
    parts = engine_parts(args.checkpoint, target, args.name, Parallel(args.tp, args.pp), **_opening(args))
    print("\n".join(plain(line, 500) for line in explain(Path(args.store), parts)))
    return 0


def _convert(args: argparse.Namespace) -> int:
    from scripts.convert import run

    with Bar() as bar:
        run(
            args.checkpoint,
            args.output,
            fold=args.fold_scales,
            project=args.normalize,
            with_code=args.with_code,
            progress=bar,
            **_opening(args),
        )
    return 0


def _opening(args: argparse.Namespace) -> dict[str, Any]:
    """The options of reading a checkpoint."""
    return {"off_sphere": "allow" if args.allow_off_sphere else "refuse", "tokenizer": args.tokenizer, "eos": args.eos}


def _bench(args: argparse.Namespace) -> int:
    from scripts.bench import run

    run(Path(args.checkpoint), args.rounds)
    return 0
