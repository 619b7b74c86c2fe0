"""What is checked: a folder, a loaded engine or a bare runner, made into the same things for the check."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.backends import StoredRows, TapFunction, backend_of
from engines.parity.driving import Runner
from engines.parity.scratch import Scratch
from engines.parity.subject import Subject, check_checkpoint, subject_of
from engines.record import recorded_precision
from export.precision import Precision, plain
from ngpt.atomic_folder import scratch_folder
from ngpt.checkpoint import Checkpoint
from ngpt.errors import EngineError
from ngpt.progress import Progress

PARITY_SLOTS = 3  # enough for ragged batches, and for sequences that reuse a slot


@dataclass(frozen=True)
class Source:
    """An engine to be checked. `release` frees its runner where it was opened here, `taps` opens its graph a second time with
    outputs for its values, where it has any to show, `stored` its weights. `subject`: the files it is made of, of a folder."""

    runner: Runner
    precision: Precision
    runtime: str
    name: str
    scratch: Scratch
    release: Callable[[], None] = lambda: None
    taps: Callable[[], TapFunction | None] = lambda: None
    stored: Callable[[], StoredRows | None] = lambda: None
    subject: Subject | None = None


@contextmanager
def opened(engine: Any, checkpoint: Checkpoint, progress: Progress) -> Iterator[Source]:
    """The engine, ready to be driven. Raises EngineError for what is none, and for one of another checkpoint."""
    if isinstance(engine, str | os.PathLike):
        with _folder(Path(engine), checkpoint, progress) as source:
            yield source
        return
    runner: Any = engine
    for holder in (engine, getattr(engine, "scheduler", None)):
        if getattr(holder, "runner", None) is not None:
            runner = holder.runner  # type: ignore[union-attr]
            break
    if any(not hasattr(runner, part) for part in ("open", "close", "prefill", "decode", "vocab_size")):
        raise EngineError("this is not an engine", expected="a folder, a loaded engine or a runner", found=type(engine).__name__)
    manifest = getattr(engine, "manifest", None)
    with tempfile.TemporaryDirectory(prefix="ngpt-") as folder:
        scratch = Scratch(Path(folder))
        if manifest is None:
            yield Source(runner, plain("fp32", "float32"), "onnxruntime", type(runner).__name__, scratch)
        else:
            yield Source(runner, recorded_precision(manifest), manifest.target.runtime, manifest.name, scratch)


@contextmanager
def _folder(folder: Path, checkpoint: Checkpoint, progress: Progress) -> Iterator[Source]:
    from engines.runtime.compatibility import slots_for
    from engines.runtime.engine import open_runner
    from engines.runtime.manifest import read_manifest, verify_files

    folder = folder.absolute()  # a name of its own, too, where "." was given
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(max_workers=1) as beside:
        digest = beside.submit(checkpoint.digest)  # which the checkpoint keeps
        verify_files(folder, manifest, progress=progress)
        progress("checking the checkpoint", 1.0)
        digest.result()
    check_checkpoint(manifest, checkpoint)
    precision, backend = recorded_precision(manifest), backend_of(manifest.target.runtime)
    with contextlib.ExitStack() as held:
        held.enter_context(freed := contextlib.ExitStack())
        runner = open_runner(folder, manifest, slots_for(manifest, PARITY_SLOTS))
        freed.callback(runner.release)
        scratch = held.enter_context(scratch_folder(folder))
        yield Source(
            runner,
            precision,
            manifest.target.runtime,
            f"{manifest.name}, {manifest.target.name}",
            Scratch(scratch),
            freed.close,
            lambda: backend.taps(folder, manifest, precision, scratch),
            lambda: backend.stored(folder, manifest),
            subject_of(manifest),
        )
