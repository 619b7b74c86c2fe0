"""verify --url: a running Triton server held against PyTorch on its checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ngpt.errors import BuildError
from scripts.commands.options import Bar, positive

if TYPE_CHECKING:
    from engines.parity.report import ParityReport
    from export.precision import Precision

_OF_FOLDERS = ("no_record", "adopt", "sign", "text", "baseline", "update_baseline", "speed")
_OF_SERVERS = ("served_engine", "target", "precision", "max_length")


def add_served(verify: argparse.ArgumentParser) -> None:
    """The options of `verify` that are about a server."""
    group = verify.add_argument_group("a running server in the place of a folder")
    group.add_argument("--url", help="host:port of its gRPC endpoint: hold what it serves to the checkpoint; nothing is recorded")
    group.add_argument("--model-name", default="tensorrt_llm", help="its model that takes token ids")
    group.add_argument(
        "--engine", dest="served_engine", type=Path, metavar="FOLDER", help="the engine that it serves: its precision"
    )
    group.add_argument("--target", help="without --engine: the target that it was built for, whose precision it has")
    group.add_argument("--precision", help="another precision of the target than its usual one")
    group.add_argument("--max-length", type=positive, help="longest prompt with its answer; the model's own length if not given")


def check_folder(args: argparse.Namespace) -> None:
    """Raise BuildError where neither a folder nor a server is given, or options of a server with a folder."""
    if args.engine is None:
        raise BuildError("what is verified", expected="an engine folder, or --url HOST:PORT", found="neither")
    for name in _OF_SERVERS:
        if getattr(args, name) is not None:
            option = "--engine" if name == "served_engine" else f"--{name.replace('_', '-')}"
            raise BuildError(f"{option} is about a server", expected="--url with it", found="an engine folder")


def held_server(args: argparse.Namespace) -> tuple[ParityReport, Path]:
    """(The report on the server, the folder that it was written to.) Raises BuildError for options that do not fit."""
    from engines.parity.baseline import write_whole
    from engines.parity.junit import junit_of
    from engines.parity.subject import check_checkpoint
    from engines.parity.wire import verify_served
    from engines.runtime.manifest import read_manifest
    from ngpt.checkpoint import open_checkpoint
    from triton_repo.served import ServedModel

    _check(args)
    engine, precision = args.served_engine, _precision(args)
    place = args.report or Path(f"{args.model_name}-parity")
    own = engine if engine is not None and (engine / "tokenizer.json").is_file() else None
    server = ServedModel(args.url, args.model_name)
    with open_checkpoint(args.checkpoint, tokenizer=own) as checkpoint, Bar() as bar:
        if engine is not None:
            check_checkpoint(read_manifest(engine), checkpoint)
        report = verify_served(
            server,
            checkpoint,
            precision=precision,
            decode_steps=args.decode_steps,
            max_length=args.max_length,
            progress=bar,
        )
    report.write(place)
    if args.junit is not None:
        write_whole(args.junit, junit_of(report, []))
    return report, place


def _precision(args: argparse.Namespace) -> Precision:
    from engines.build import choose_target
    from engines.record import recorded_precision
    from engines.runtime.manifest import read_manifest

    if args.served_engine is not None:
        return recorded_precision(read_manifest(args.served_engine))
    return choose_target(args.target, args.precision).precision


def _check(args: argparse.Namespace) -> None:
    if args.engine is not None:
        raise BuildError(
            "what is verified",
            expected="an engine folder, or --url",
            found="both",
            remedy="say which folder the server serves with --engine",
        )
    if args.checkpoint is None:
        raise BuildError("what to compare the server with", expected="--checkpoint DIR", found="nothing")
    if (args.served_engine is None) == (args.target is None):
        raise BuildError(
            "what the served engine computes in",
            expected="one of --engine FOLDER and --target NAME",
            found="neither" if args.target is None else "both",
            remedy="the reference's noise is measured in that precision",
        )
    for name in _OF_FOLDERS:
        if getattr(args, name, None) not in (None, False):
            raise BuildError(f"--{name.replace('_', '-')} is for an engine folder", expected="no --url", found="both")
