"""verify: an engine held against PyTorch on its checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.errors import BuildError, ParityFailedError, os_trouble
from scripts.commands.options import Bar, Command, positive
from scripts.commands.reporting import Reporting, add_reporting
from scripts.commands.verifying_served import add_served, check_folder, held_server
from scripts.terminal import plain

if TYPE_CHECKING:
    from engines.parity.report import ParityReport
    from engines.record import Signature


def add_verify(command: Command) -> None:
    """`ngpt-deploy verify`."""
    verify = command("verify", _verify, "Compare an engine with PyTorch on its checkpoint and record the verdict in its folder.")
    verify.add_argument("engine", type=Path, nargs="?", help="engine folder; its files are held against its manifest first")
    verify.add_argument("--checkpoint", help="the checkpoint that the engine was built from, to the bit")
    verify.add_argument(
        "--decode-steps",
        type=positive,
        help="decode steps per prompt; if not given 64, 32 from a billion parameters on, and at most half the model's length",
    )
    verify.add_argument(
        "--report", type=Path, help="folder that gets parity.json and parity.html, too; the engine's own alone if not given"
    )
    verify.add_argument(
        "--no-record", action="store_true", help="leave the engine's folder as it is: the report alone is written"
    )
    verify.add_argument(
        "--adopt",
        type=Path,
        metavar="REPORT",
        help="record the verdict of a parity.json from another machine, where these same files were verified; nothing is run",
    )
    verify.add_argument(
        "--sign",
        type=Path,
        metavar="KEY",
        help="private key in PEM: sign the recorded verdict, which `package --require-signature` then asks for",
    )
    verify.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="UTF-8 text that is compared as well, in windows; gives the perplexity of engine and reference over it",
    )
    verify.add_argument("--json", action="store_true", help="print JSON alone: the verdict and its numbers")
    add_reporting(verify)
    add_served(verify)


def _verify(args: argparse.Namespace) -> int:
    if args.url is not None:
        report, place = held_server(args)
        _tell(args, report, place, {})
        conclude(args.url, report.verdict, place / "parity.html", quiet=args.json)
        return 0
    check_folder(args)
    return _verify_folder(args)


def _verify_folder(args: argparse.Namespace) -> int:
    from engines.record import record_verdict

    engine = args.engine.absolute()  # a name of its own, too, where "." was given
    _check_options(args, engine)
    reporting = Reporting.of(args, engine)
    signature = _signature(args)
    with _place(args.report):
        adopting = args.adopt is not None
        report = _adopted(args.adopt, engine) if adopting else _compared(args, engine, reporting)
    place = args.report or engine
    if args.report is not None:
        report.write(args.report)
    if not args.no_record:
        record_verdict(engine, report, signature=signature)
    elif args.report is None:
        place = engine.with_name(engine.name + "-parity")
        report.write(place)
    moves = reporting.moves(report)
    reporting.write(report, moves)
    _tell(args, report, place, reporting.as_json(moves))
    if not args.json:
        reporting.show(moves)
    conclude(args.engine, report.verdict, place / "parity.html", quiet=args.json)
    reporting.judge(moves)
    return 0


def _tell(args: argparse.Namespace, report: ParityReport, place: Path, more: dict[str, Any]) -> None:
    """The numbers that head the report, as JSON or in lines."""
    if args.json:
        files = {"report": str(place / "parity.json"), "html": str(place / "parity.html")}
        print(json.dumps({**report.headlines(), **files, **more}, indent=2))
        return
    for name, value in report.headlines().items():
        if name != "verdict":
            print(f"{name:<28} {_shown(value)}")


def _check_options(args: argparse.Namespace, engine: Path) -> None:
    if (args.checkpoint is None) == (args.adopt is None):
        raise BuildError(
            "what to compare the engine with",
            expected="one of --checkpoint DIR and --adopt REPORT",
            found="neither" if args.adopt is None else "both",
        )
    if args.sign is not None and args.no_record:
        raise BuildError("--sign signs what is recorded", expected="no --no-record", found="both", remedy="leave one out")
    if args.report is not None and args.report.exists() and args.report.samefile(engine):
        raise BuildError(
            "--report is the engine's own folder, which gets the report with the verdict",
            expected="another folder",
            found=str(args.report),
            remedy="leave --report out",
        )


@contextlib.contextmanager
def _place(report: Path | None) -> Iterator[None]:
    """The report's folder is made before anything is run for minutes, and taken away where that comes to nothing."""
    if report is None:
        yield
        return
    made = not report.exists()
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found, remedy = os_trouble(error)
        raise BuildError(f"the report cannot be written to {report}", found=found, remedy=remedy) from error
    try:
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                report.rmdir()
        raise


def _compared(args: argparse.Namespace, engine: Path, reporting: Reporting) -> ParityReport:
    from engines.parity.prompts import read_text
    from engines.parity.verify import verify
    from ngpt.checkpoint import open_checkpoint

    text = None if args.text is None else read_text(args.text)

    # The text of the comparison is the engine's own: it may have been built with another tokenizer than the checkpoint's.
    own = engine if (engine / "tokenizer.json").is_file() else None
    with open_checkpoint(args.checkpoint, tokenizer=own) as checkpoint:

        def run(seed: int) -> ParityReport:
            with Bar() as bar:
                return verify(engine, checkpoint, decode_steps=args.decode_steps, text=text, seed=seed, progress=bar)

        report = run(0)
        reporting.measure(report, checkpoint, run)
        return report


def _adopted(path: Path, engine: Path) -> ParityReport:
    """The report of another machine; `record_verdict` holds its subject against the engine's manifest, this the files."""
    from engines.parity.report import ParityReport
    from engines.runtime.manifest import read_manifest, verify_files
    from engines.runtime.verdict import check_subject, read_report

    report = ParityReport.from_dict(read_report(path))
    manifest = read_manifest(engine)
    check_subject(report.subject or {}, manifest)
    with Bar() as bar:
        verify_files(engine, manifest, progress=bar)
    return report


def _signature(args: argparse.Namespace) -> Signature | None:
    """Of the key; or that which lies beside an adopted report."""
    from engines.runtime.manifest import read_bounded
    from engines.runtime.verdict import MAX_REPORT_BYTES, SIGNATURE_FILE
    from engines.signing import signing_with

    if args.sign is not None:
        return signing_with(args.sign)
    if args.adopt is None or not (beside := args.adopt.with_name(SIGNATURE_FILE)).is_file():
        return None
    text = read_bounded(beside, MAX_REPORT_BYTES).decode("utf-8", "replace")
    return lambda *_: text


def _shown(value: Any) -> str:
    from engines.parity.words import number

    return plain(number(value), 200)


def conclude(engine: Path | str, verdict: str, page: Path, *, quiet: bool = False) -> None:
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
