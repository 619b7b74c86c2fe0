"""verify: an engine held against PyTorch on its checkpoint."""

import argparse
import json
from pathlib import Path
from typing import Any

from ngpt.errors import BuildError, ParityFailedError
from scripts.commands.options import Bar, Command, positive
from scripts.terminal import plain


def add_verify(command: Command) -> None:
    """`ngpt-deploy verify`."""
    verify = command("verify", _verify, "Compare an engine with PyTorch on its checkpoint and write the report.")
    verify.add_argument("engine", type=Path, help="engine folder; its files are held against its manifest first")
    verify.add_argument("--checkpoint", required=True, help="the checkpoint that the engine was built from")
    verify.add_argument(
        "--decode-steps",
        type=positive,
        help="teacher-forced decode steps per prompt; 64, or half the model's length, if not given",
    )
    verify.add_argument(
        "--report", type=Path, help="folder for parity.json and parity.html; a new one beside the engine if not given"
    )
    verify.add_argument("--json", action="store_true", help="print JSON alone: the verdict and its numbers")


def _verify(args: argparse.Namespace) -> int:
    from engines.build import verify_folder
    from engines.runtime.manifest import read_manifest, verify_files
    from ngpt.checkpoint import open_checkpoint

    engine = args.engine.absolute()  # a name of its own, too, where "." was given
    verify_files(engine, read_manifest(engine))
    beside = engine.with_name(engine.name + "-parity")
    report = args.report or beside
    if report.exists() and report.samefile(engine):
        raise BuildError(
            "--report is the engine's own folder, whose report is part of it",
            expected="another folder",
            found=str(report),
            remedy=f"leave --report out: it is then {beside}",
        )
    # The text of the comparison is the engine's own: it may have been built with another tokenizer than the checkpoint's.
    own = engine if (engine / "tokenizer.json").is_file() else None
    with open_checkpoint(args.checkpoint, tokenizer=own) as checkpoint:
        with Bar() as bar:
            summary = verify_folder(engine, checkpoint, decode_steps=args.decode_steps, report=report, progress=bar)
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        for name, value in summary.items():
            if name not in ("verdict", "report", "html"):
                print(f"{name:<28} {_shown(value)}")
    conclude(args.engine, summary["verdict"], report / summary["html"], quiet=args.json)
    return 0


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(value, 200)


def conclude(engine: Path, verdict: str, page: Path, *, quiet: bool = False) -> None:
    """Print the verdict; raise ParityFailedError for any but a pass."""
    if not quiet:
        print(f"parity   {verdict}  (report: {page})")
    if verdict != "pass":
        raise ParityFailedError(
            f"{engine} does not agree with PyTorch",
            expected="verdict pass",
            found=verdict,
            remedy=f"open {page} to see where they part ways",
        )
