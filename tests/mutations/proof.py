"""Judging one engine with one fault: what the gate said of it, and whether that was right."""

import contextlib
import dataclasses
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from engines.parity import verify
from engines.parity.gate import MEAN_MULTIPLE
from export.taps import position_of
from ngpt.checkpoint import open_checkpoint
from tests.mutations.lowerings import LOWERINGS
from tests.mutations.table import FAITHFUL, MUTATIONS
from tests.mutations.weights import LAYER

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CHECKPOINTS = ("gqa", "llama3-rope-bias", "dead-mlp", "research-checkpoint", "research-train-py")
STEPS = 16
_TAP = "angle at "
FAINT = 3e-4
"""Factor of suv in one layer: relu2 squares it, and the branch is then about as long as the eps of its norm."""


@dataclass(frozen=True)
class Cell:
    """One engine. effect: rms by which the fault moved the logits, over the noise's; named: the first tap that the report
    names; failed: checks that failed, in the gate's order."""

    mutation: str
    checkpoint: str
    lowering: str
    verdict: str
    effect: float
    failed: tuple[str, ...]
    named: str | None
    taps: tuple[str, ...]

    @property
    def kinds(self):
        """What failed, in a word each: prefill, decode, taps, numbers (not finite), weights (of the file)."""
        words = {
            "prefill:": "prefill",
            "decode:": "decode",
            "angle at": "taps",
            "every output": "numbers",
            "weights in": "weights",
        }
        return tuple(word for start, word in words.items() if any(name.startswith(start) for name in self.failed))


class Proof:
    """Runs engines, and keeps what the faithful ones computed to compare with."""

    def __init__(self, scratch):
        self.scratch, self.number, self.right = Path(scratch), 0, {}

    def cell(self, mutation, name):
        """Build, run and judge."""
        right = self.faithful(mutation.checkpoint, name)
        return right if mutation.name == FAITHFUL.name else self._run(mutation, name)

    def faithful(self, checkpoint, name):
        """The cell of the engine without a fault."""
        if (checkpoint, name) not in self.right:
            logits = []
            cell = self._run(dataclasses.replace(FAITHFUL, checkpoint=checkpoint), name, logits)
            self.right[checkpoint, name] = cell, np.concatenate(logits)
        return self.right[checkpoint, name][0]

    def _run(self, mutation, name, kept=None):
        lowering = LOWERINGS[name]()
        logits = [] if kept is None else kept
        self.number += 1
        folder = self.scratch / str(self.number)
        folder.mkdir(parents=True)
        with open_checkpoint(self.checkpoint(mutation.checkpoint)) as checkpoint:
            with lowering.engine(checkpoint, mutation, folder) as (runner, taps):
                report = verify(
                    _Recording(runner, logits), checkpoint, precision=lowering.precision, runtime=lowering.runtime, taps=taps,
                    decode_steps=STEPS, stored=getattr(lowering, "stored", None),
                )  # fmt: skip
        shutil.rmtree(folder)
        noises = [c.noise for c in report.checks if c.name.endswith("logit error, mean")]
        effect = 0.0
        if kept is None:
            change = np.concatenate(logits) - self.right[mutation.checkpoint, name][1]
            effect = float(np.sqrt(np.mean(np.square(change, dtype=np.float64)))) / max(noises)
        failed = tuple(check.name for check in report.failures)
        taps = tuple(dict.fromkeys(c.name[len(_TAP) :].split(",")[0] for c in report.checks if c.name.startswith(_TAP)))
        return Cell(
            mutation.name, mutation.checkpoint, name, report.verdict, effect, failed, report.summary["first_divergence"], taps
        )

    def checkpoint(self, name):
        """The folder of a golden checkpoint, or of one that is made from it."""
        if name != "faint-mlp":
            return GOLDEN / name
        folder = self.scratch / name
        if not folder.is_dir():
            shutil.copytree(GOLDEN / "gqa", folder, ignore=shutil.ignore_patterns("golden.npz"))
            tensors = safetensors.numpy.load_file(folder / "model.safetensors")
            tensors[f"model.layers.{LAYER}.mlp.suv.weight"] *= np.float32(FAINT)
            safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


class _Recording:
    """A runner whose logits are kept."""

    def __init__(self, runner, kept):
        self._runner, self._kept = runner, kept

    def __getattr__(self, name):
        return getattr(self._runner, name)

    def prefill(self, *args, **options):
        logits = self._runner.prefill(*args, **options)
        self._kept.append(np.array(logits, ndmin=2))
        return logits

    def decode(self, *args):
        logits = self._runner.decode(*args)
        self._kept.append(np.array(logits))
        return logits


@contextlib.contextmanager
def proof():
    """With a folder for engines that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ngpt-mutations-") as scratch:
        yield Proof(scratch)


@dataclass(frozen=True)
class Judged:
    """Whether the gate said of an engine what it should say; `said`: in a few words."""

    right: bool
    caught: bool
    said: str


def judged(mutation, cell):
    """An engine without a fault must pass. One with a fault must fail, its first tap named, and no phase blamed that is right; or it
    moved its logits by no more than the gate lets rounding move them, and nobody could tell it from a right one."""
    if mutation.name == FAITHFUL.name:
        return Judged(cell.verdict == "pass", False, cell.verdict if cell.verdict == "pass" else f"failed {cell.failed[0]}")
    if cell.verdict == "pass":
        within = cell.effect <= MEAN_MULTIPLE
        return Judged(within, False, f"passed, moved by {cell.effect:.2g} x noise")
    found = []
    # A fault that rounding hides in every value, and that the weights of the file show, has no first tap.
    hidden = cell.named is None and cell.effect <= MEAN_MULTIPLE and set(cell.kinds) == {"weights"}
    if (
        cell.taps
        and not hidden
        and cell.named != (first := expected(mutation.named(LOWERINGS[cell.lowering]().kinds), cell.taps))
    ):
        found.append(f"first tap {cell.named}, not {first}")
    if stray := {"prefill", "decode"} & set(cell.kinds) - set(mutation.phases):
        found.append(f"{', '.join(sorted(stray))} blamed")
    if found:
        return Judged(False, True, "; ".join(found))
    return Judged(True, True, f"caught by {', '.join(cell.kinds)}, first tap {cell.named}")


def plan(only=None, lowerings=None):
    """The cells: on each lowering its right engines, on every checkpoint unless some faults alone are wanted, then those with
    faults."""
    found = []
    for name in lowerings or LOWERINGS:
        kinds = LOWERINGS[name]().kinds
        chosen = [each for each in MUTATIONS if (not only or each.name in only) and each.applies(kinds)]
        used = dict.fromkeys((*(CHECKPOINTS if not only else ()), *(each.checkpoint for each in chosen)))
        found += [(dataclasses.replace(FAITHFUL, checkpoint=checkpoint), name) for checkpoint in used]
        found += [(each, name) for each in chosen]
    return found


def expected(first, taps):
    """The first of the taps that a lowering shows at or after the one where a fault begins; None for a fault that none shows."""
    return None if first is None else min((tap for tap in taps if position_of(tap) >= position_of(first)), key=position_of)


def by_name(name):
    return next(mutation for mutation in MUTATIONS if mutation.name == name)
