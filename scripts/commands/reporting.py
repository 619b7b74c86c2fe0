"""What `verify` leaves for other programs: JUnit XML, and a comparison with what was recorded before."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngpt.errors import BuildError, RegressionError
from scripts.commands.options import Bar, positive

if TYPE_CHECKING:
    from engines.parity.baseline import Entry, Move
    from engines.parity.report import ParityReport
    from engines.runtime.manifest import Manifest
    from ngpt.checkpoint import Checkpoint

RUNS = 5


def add_reporting(verify: argparse.ArgumentParser) -> None:
    """The options of `verify` for continuous integration."""
    ci = verify.add_argument_group("for continuous integration (docs/ci.md)")
    ci.add_argument("--junit", type=Path, metavar="FILE", help="write the checks as JUnit XML: one test case a check")
    ci.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="compare parity ratios and size (with --speed the speed, too) with those recorded in FILE, and print what moved; "
        "exit code 4 where one of them got worse by more than its noise",
    )
    ci.add_argument(
        "--update-baseline",
        action="store_true",
        help="record the figures of this engine in the --baseline FILE in place of comparing; other targets in it stay",
    )
    ci.add_argument(
        "--runs", type=positive, default=RUNS, help="of --update-baseline: runs by which the noise of each figure is measured"
    )
    ci.add_argument(
        "--speed",
        action="store_true",
        help="time prefill and decode against PyTorch in this process, as figures of the baseline",
    )


@dataclass
class Reporting:
    """The options, the engine's manifest, and what was recorded of it: read before anything is run for minutes."""

    args: argparse.Namespace
    engine: Path
    manifest: Manifest
    entry: Entry | None
    speeds: dict[str, float] = field(default_factory=dict)
    recorded: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace, engine: Path) -> Reporting:
        """Raises BuildError for options that do not go together, EngineFileError for a baseline of something else."""
        from engines.parity.baseline import read_baseline
        from engines.runtime.manifest import read_manifest

        if (args.update_baseline or args.speed) and args.baseline is None:
            option = "--update-baseline" if args.update_baseline else "--speed"
            raise BuildError(f"{option} without a file", expected="--baseline FILE with it", found="none")
        if args.adopt is not None and (args.update_baseline or args.speed):
            raise BuildError(
                "--adopt runs nothing", expected="--baseline FILE alone with it", found="--update-baseline or --speed"
            )
        manifest = read_manifest(engine)
        compared = args.baseline is not None and not args.update_baseline
        return cls(args, engine, manifest, read_baseline(args.baseline, manifest) if compared else None)

    def measure(self, first: ParityReport, checkpoint: Checkpoint, again: Callable[[int], ParityReport]) -> None:
        """Time the engine where that is asked for; for --update-baseline run it again, too, and write the baseline.

        `again`: seed -> the report of another run. An engine that does not agree with PyTorch is no standard to hold others to:
        nothing is recorded of it.
        """
        from engines.parity.baseline import entry_of, figures_of, write_baseline

        if not self.args.update_baseline or first.verdict != "pass":
            self.speeds = self._timed(checkpoint)
            return
        runs = [figures_of(first, self.manifest, self._timed(checkpoint))]
        runs += [figures_of(again(seed), self.manifest, self._timed(checkpoint)) for seed in range(1, self.args.runs)]
        write_baseline(self.args.baseline, self.manifest, entry_of(self.manifest, first, runs))
        self.recorded = True

    def moves(self, report: ParityReport) -> list[Move]:
        """What moved since the baseline was recorded; nothing without one."""
        from engines.parity.baseline import check_positions, compare, figures_of

        if self.entry is None:
            return []
        check_positions(self.args.baseline, self.entry, report)
        return compare(self.entry, figures_of(report, self.manifest, self.speeds))

    def write(self, report: ParityReport, moves: Sequence[Move]) -> None:
        """The JUnit file, if one is wanted."""
        from engines.parity.baseline import write_whole
        from engines.parity.junit import junit_of

        if self.args.junit is not None:
            write_whole(self.args.junit, junit_of(report, moves))

    def show(self, moves: Sequence[Move]) -> None:
        """The table of what moved."""
        from engines.parity.baseline import table

        if moves:
            print(f"\nsince {self.args.baseline} was recorded:\n{table(moves)}\n")
        elif self.recorded:
            print(f"baseline {self.args.baseline}: {self.manifest.target.name} recorded, over {self.args.runs} run(s)")

    @staticmethod
    def as_json(moves: Sequence[Move]) -> dict[str, Any]:
        """What `--json` says of the baseline; nothing without one."""
        return {"baseline": [asdict(move) | {"change": move.change} for move in moves]} if moves else {}

    def judge(self, moves: Sequence[Move]) -> None:
        """Raise RegressionError where a figure got worse."""
        worse = [move for move in moves if move.worse]
        if worse:
            raise RegressionError(
                f"{self.args.engine} is worse than {self.args.baseline} says",
                expected="no figure worse by more than its noise",
                found="; ".join(f"{move.name}: {move.in_words()}" for move in worse[:3]) + (", and others" if worse[3:] else ""),
                remedy="see what changed since; if it is meant, record it with --update-baseline",
            )

    def _timed(self, checkpoint: Checkpoint) -> dict[str, float]:
        from engines.parity.speed import speed_ratios

        if not self.args.speed:
            return {}
        with Bar() as bar:
            return speed_ratios(self.engine, checkpoint, bar)
