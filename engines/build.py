"""From a checkpoint to an engine folder: open, check, write, record, verify. The folder appears whole or not at all, and its
verdict after it, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.backends import Job, backend_of
from engines.device import detect, target_for
from engines.identity import components
from engines.key import key_of
from engines.memory import memory
from engines.record import NOT_RUN, add_note, record, record_verdict
from engines.resume import discard, resuming
from engines.runtime.errors import ServingError
from engines.runtime.manifest import MANIFEST_NAME, read_manifest
from engines.runtimes import runtime_of
from engines.store import Store
from engines.target import AUTO, DEFAULT, Target, load_target, with_kv_cache
from export.trtllm.parallel import Parallel
from ngpt.atomic_folder import check_free, new_folder
from ngpt.checkpoint import Checkpoint, open_checkpoint
from ngpt.checkpoint.base import OffSphere
from ngpt.errors import BuildError, NGPTDeployError, TargetError
from ngpt.progress import Progress, part_of, silent
from ngpt.text_files import End

MAX_NAME = 200


def build_engine(
    checkpoint: str | Path,
    target: str | Path | Target,
    output: str | Path | None = None,
    *,
    precision: str | None = None,
    name: str | None = None,
    verify: bool = True,
    tp: int = 1,
    pp: int = 1,
    kv_cache: str = "auto",
    off_sphere: OffSphere = "refuse",
    tokenizer: str | Path | None = None,
    eos: Sequence[End] = (),
    store: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> Path:
    """Build the engine of a checkpoint for a target; returns the folder.

    The folder appears with an engine that is not verified; where it can run on this machine it is verified then, and the
    verdict added. An engine that fails parity stays, with its verdict: the report says where it parts ways. For a TensorRT-LLM
    target the folder holds a converted checkpoint and the command that builds it, and an engine with a manifest where
    `trtllm-build` is installed. What is unusual about a checkpoint is logged as a warning, and recorded.

    Args:
        checkpoint: a Hugging Face folder, or the research code's ckpt.pt.
        target: a name, the path of a target's file, or a `Target`. "auto" is the one of this machine's GPU, or the default
            where there is none.
        output: the engine's folder; must not exist. With a `store` it may be left out: the store's own folder is returned,
            which others share and nobody may change.
        precision: another one that the target offers.
        name: of the engine, in its manifest; that of the checkpoint's folder if not given.
        verify: whether to compare the engine with PyTorch.
        tp: GPUs a layer is divided among (TensorRT-LLM targets).
        pp: GPUs the layers are divided among (TensorRT-LLM targets).
        kv_cache: "fp8" halves the cache (TensorRT-LLM targets).
        off_sphere: "allow" builds what the file says where its matrices are far from unit norm.
        tokenizer: a folder or a tokenizer.json to take in place of the checkpoint's.
        eos: the tokens that end a text, ids or texts of the tokenizer, in place of the checkpoint's.
        store: a folder of engines (`engines.store`): one that is made of the same parts is taken from it and not built.
        resume: continue where a killed build of the same engine to the same place stopped, and leave what is complete for
            the next one.
        progress: called with what is being done and the part that is done.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be read, or is not what it says.
        TargetError: an unknown target, or a card that the model does not fit.
        UnsupportedError: sizes that cannot be divided, or that the runtime lacks.
        OutputExistsError: ``output`` exists. MissingPackageError: a runtime is not installed.
        BuildError: disk full, output not writable, refused by the runtime's builder; or built, and not to be verified.
    """
    engine = engine_name(name, checkpoint)  # refused before anything is read
    chosen, parallel = with_kv_cache(choose_target(target, precision), kv_cache), Parallel(tp, pp)
    check_division(chosen, parallel)
    backend, folder = backend_of(chosen.runtime), None if output is None else Path(output)
    tools = backend.tools()
    if folder is not None:
        check_free(folder)
    elif store is None:
        raise BuildError("there is no place for the engine", expected="an output, a store, or both", remedy="give --output")
    with open_checkpoint(checkpoint, off_sphere=off_sphere, tokenizer=tokenizer, eos=eos) as opened:
        job = Job(opened, chosen, parallel)
        backend.check(job.spec, chosen, parallel)
        parts: dict[str, Any] = {}
        if store is not None or resume:
            progress("reading the weights for their digest", 0.0)
            parts = components(job, engine, tools)

        def write(place: Path) -> None:
            making = part_of(progress, 0.0, 0.75)
            if not resume:
                _publish(job, place, engine, tools, making)
                discard(place.absolute().parent, place.name)
                return
            with resuming(place if store is None else Path(store) / key_of(parts), parts) as journal:
                _publish(dataclasses.replace(job, journal=journal), place, engine, tools, making)

        def check(place: Path) -> None:
            _verify_built(place, opened, chosen, part_of(progress, 0.75, 1.0))

        # The engine is published before it is verified: no trouble of the check throws away what was built.
        checks = verify and runs_here(chosen)
        if store is not None:
            needed = backend.estimate(job.spec, chosen, parallel)
            asked = check if checks else None
            folder = Store(store).obtain(parts, write, verify=asked, output=folder, needed=needed, progress=progress)
        elif folder is not None:
            write(folder)
            if checks and (folder / MANIFEST_NAME).is_file():
                check(folder)
        progress("done", 1.0)
    assert folder is not None
    return folder


def _publish(job: Job, folder: Path, name: str, tools: Mapping[str, str], progress: Progress) -> None:
    """Check the weights, and write the engine, whole, without a verdict."""
    backend, opened = backend_of(job.target.runtime), job.checkpoint
    opened.validate(part_of(progress, 0.0, 0.25))
    opened.report_notes()
    with new_folder(folder, needed=backend.estimate(job.spec, job.target, job.parallel)) as work:
        written = backend.write(job, work, part_of(progress, 0.25, 1.0))
        opened.text.copy_to(work)
        if written.graph is not None:
            record(work, job, written, name, tools)


def _verify_built(folder: Path, checkpoint: Checkpoint, target: Target, progress: Progress) -> None:
    from engines.parity.verify import verify

    try:
        record_verdict(folder, verify(folder, checkpoint, progress=progress))
    except ServingError as error:
        if target.gpu is None:
            raise _unverified(folder, error) from error
        # The card may be busy or its driver old: the engine says that it is unverified and why, and the packager refuses it.
        add_note(folder, read_manifest(folder), f"{NOT_RUN}: {error}")
    except (NGPTDeployError, MemoryError) as error:
        raise _unverified(folder, error) from error


def _unverified(folder: Path, error: BaseException) -> BuildError:
    return BuildError(
        f"{folder} is built, but could not be verified",
        found=str(error) or type(error).__name__,
        remedy=f"verify it with: ngpt-deploy verify {folder} --checkpoint DIR (build --no-verify leaves it out)",
    )


def engine_parts(checkpoint: str | Path, target: Target, name: str | None, parallel: Parallel, **opening: Any) -> dict[str, Any]:
    """What the engine of a checkpoint would be made of (`engines.identity`). Reads the weights for their digest.

    opening: options of `open_checkpoint`.
    """
    engine = engine_name(name, checkpoint)
    check_division(target, parallel)
    backend = backend_of(target.runtime)
    tools = backend.tools()
    with open_checkpoint(checkpoint, **opening) as opened:
        job = Job(opened, target, parallel)
        backend.check(job.spec, target, parallel)
        return components(job, engine, tools)


def dry_run(checkpoint: str | Path, target: Target, output: Path, parallel: Parallel, **opening: Any) -> str:
    """What `build_engine` would do, in words. Reads the checkpoint's header only and writes nothing; raises as it does.

    opening: options of `open_checkpoint`.
    """
    check_division(target, parallel)
    backend = backend_of(target.runtime)
    check_free(output)
    with open_checkpoint(checkpoint, **opening) as opened:
        job = Job(opened, target, parallel)
        backend.check(job.spec, target, parallel)
        lines = [f"target {target.name}: {target.runtime}, {target.precision.name}, weights as {target.precision.projections}"]
        if target.gpu is not None:
            length = job.spec.max_length
            lines.append("on each GPU: " + memory(job.spec, target, parallel).arithmetic(1, length))
        lines.append(f"on disk: at most {backend.estimate(job.spec, target, parallel) / 1e6:.0f} MB while it is built")
        return "\n".join([*lines, *backend.outline(job, output)])


def check_division(target: Target, parallel: Parallel) -> None:
    """Raise TargetError unless the target's runtime can divide a model so."""
    if parallel.world > 1 and not runtime_of(target.runtime).divides:
        raise TargetError(
            f"the target {target.name} is one device's",
            expected="--tp 1 --pp 1",
            found=f"--tp {parallel.tp} --pp {parallel.pp}",
            remedy="choose a TensorRT-LLM target",
        )


def choose_target(name: str | Path | Target, precision: str | None = None) -> Target:
    """A target by name or file, or as it is; "auto" is the one of this machine's GPU, else the default. Raises TargetError."""
    if isinstance(name, Target):
        return name
    if name == AUTO:
        device = detect()
        name = DEFAULT if device is None else target_for(device).name
    return load_target(name, precision)


def runs_here(target: Target) -> bool:
    """Whether an engine of the target can be run, and so verified, on this machine."""
    if target.gpu is None:
        return target.executed
    device = detect()
    return device is not None and device.compute_capability == target.gpu.compute_capability


def engine_name(name: str | None, checkpoint: str | Path) -> str:
    """The name as it was given, or that of the checkpoint's folder. Raises BuildError for one that cannot be shown."""
    if name is None:
        folder = Path(checkpoint)
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # opening it says what is wrong with the path
            folder = folder.resolve()
        return "".join(letter if letter.isprintable() else "?" for letter in folder.name) or "ngpt"
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise BuildError(
            "the engine's name",
            expected=f"1 to {MAX_NAME} characters that can be printed",
            found=ascii(name)[:80],
            remedy="choose another --name",
        )
    return name
