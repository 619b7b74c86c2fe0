"""What an engine's manifest says: put together, written and read back here, and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from engines.backends.protocol import Job, Written
from engines.runtime.errors import EngineFileError
from engines.runtime.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    ModelInfo,
    TargetInfo,
    describe_file,
    read_manifest,
    write_manifest,
)
from engines.runtime.verdict import REPORT_FILES, SIGNATURE_FILE, check_subject
from engines.runtimes import precision_of
from export.precision import Format, Precision
from ngpt import __version__
from ngpt.atomic_folder import replace_file
from ngpt.errors import NGPTDeployError

if TYPE_CHECKING:
    from engines.parity.report import ParityReport

_PACKAGES = ("torch", "transformers", "numpy")
_MAX_NOTE = 2000
NOT_RUN = "could not be run here"
"""How the note begins that a build leaves where its engine could not be verified."""
# Beside the packages ngpt and export, what decides what an engine computes.
_BUILDERS = ("build.py", "backends/*.py")


def record(folder: Path, job: Job, written: Written, name: str, tools: Mapping[str, str]) -> Manifest:
    """Write the manifest of the engine in `folder`, every file of which is hashed, and return it."""
    manifest = _described(job, written, name, tools, _files(folder))
    write_manifest(folder, manifest)
    return manifest


Signature = Callable[[Manifest, Mapping[str, str], str], str]


def record_verdict(folder: Path, report: ParityReport, *, signature: Signature | None = None) -> Manifest:
    """Put a verdict and its report into an engine's folder, and return the manifest that says so. Killed at any moment, the
    folder is left with the old verdict, without one, or with the new one, and whole.

    signature: makes the text of `SIGNATURE_FILE` from the engine's manifest, the report's digest by name, and the verdict.

    Raises EngineFileError where the report is about other files than the folder's, BuildError where nothing can be written.
    """
    with _alone(folder):
        manifest = read_manifest(folder)
        check_subject(report.subject or {}, manifest)
        files = {name: entry for name, entry in manifest.files.items() if name not in REPORT_FILES}
        if manifest.parity is not None or files.keys() != manifest.files.keys():
            # The manifest must never name a report that is being replaced.
            write_manifest(folder, dataclasses.replace(manifest, parity=None, files=files))
        data, page = report.write(folder)
        described = {path.name: describe_file(path) for path in (data, page)}
        signed = folder / SIGNATURE_FILE
        if signature is not None:
            text = signature(manifest, {data.name: described[data.name].sha256}, report.verdict)
            replace_file(signed, text)
            described[signed.name] = describe_file(signed)
        else:
            signed.unlink(missing_ok=True)  # of an earlier verdict
        target = manifest.target
        if target.note.startswith(NOT_RUN):
            target = dataclasses.replace(target, note="")
        parity = {
            "verdict": report.verdict,
            "report": data.name,
            "html": page.name,
            "report_sha256": described[data.name].sha256,
            "subject": report.subject,
            **report.headlines(),
        }
        manifest = dataclasses.replace(manifest, parity=parity, files={**files, **described}, target=target)
        write_manifest(folder, manifest)
        return manifest


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else records a verdict meanwhile; whoever waits comes next."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(ImportError, OSError):  # no locks on this system, or on this file system
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            held.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        for left in folder.glob(f".{MANIFEST_NAME}.*"):
            left.unlink(missing_ok=True)  # of a process that was killed as it wrote
        yield


def add_note(folder: Path, manifest: Manifest, note: str) -> Manifest:
    """The manifest with a note on the target, written."""
    manifest = dataclasses.replace(manifest, target=dataclasses.replace(manifest.target, note=note[:_MAX_NOTE]))
    write_manifest(folder, manifest)
    return manifest


def recorded_precision(manifest: Manifest) -> Precision:
    """What an engine computes in and how its weights are stored, as its manifest says. Raises EngineFileError."""
    name = manifest.target.precision
    try:
        if manifest.precision:
            return Precision.from_description(name, manifest.precision)
        found = precision_of(manifest.target.runtime, name).with_cache(manifest.model.cache_dtype)
        return _with_block(found, manifest.flags.get("block_size"))
    except NGPTDeployError as error:
        raise EngineFileError(
            f"the precision of {manifest.name[:200]}",
            expected=error.expected,
            found=str(error.found),
            remedy="Build the engine again; do not edit the manifest by hand.",
        ) from error


def _with_block(precision: Precision, block: object) -> Precision:
    """Version 0.1 wrote the block of its ONNX engines among the flags."""
    if not isinstance(block, int) or precision.activations is None:
        return precision

    def wide(form: Format) -> Format:
        return form if form.block is None else dataclasses.replace(form, block=block)

    return dataclasses.replace(
        precision, projections=wide(precision.projections), head=wide(precision.head), activations=wide(precision.activations)
    )


def _described(job: Job, written: Written, name: str, tools: Mapping[str, str], files: Mapping[str, FileEntry]) -> Manifest:
    spec, target, checkpoint = job.spec, job.target, job.checkpoint
    assert written.graph is not None  # who asks for a manifest has an engine
    notes = {"checkpoint_notes": list(checkpoint.notes)} if checkpoint.notes else {}
    installed = {package: version for package in _PACKAGES if (version := _version(package)) is not None}
    installed["ngpt-deploy"] = __version__
    return Manifest(
        name=name,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        target=TargetInfo(
            name=target.name,
            runtime=target.runtime,
            providers=target.providers,
            precision=target.precision.name,
            cache=written.cache or target.cache,
            executed=target.executed,
            note=target.note,
        ),
        model=ModelInfo(
            architecture="ngpt",
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            max_length=spec.max_length,
            cache_dtype=target.precision.cache,
            bos_token_id=spec.bos_token_id,
            eos_token_ids=tuple(spec.eos_token_ids),
            pad_token_id=spec.pad_token_id,
        ),
        graph=written.graph,
        digests={"weights": checkpoint.digest(), "spec": spec.digest(), "code": code_digest()},
        tools=installed | dict(tools) | dict(written.tools),
        flags=dict(written.flags) | notes,
        files=files,
        generation=checkpoint.text.sampling,
        precision=target.precision.describe(),
    )


def _files(folder: Path) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file but the manifest."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_NAME:
            found[name] = describe_file(path)
    return found


def code_digest() -> str:
    """Digest of the sources that decide what an engine computes: the packages ngpt and export, and this one's builders."""
    root, total = Path(__file__).resolve().parents[1], hashlib.sha256()
    builders = [path for pattern in _BUILDERS for path in (root / "engines").glob(pattern)]
    for path in sorted([*root.glob("ngpt/**/*.py"), *root.glob("export/**/*.py"), *root.glob("export/plugins/*.cu*"), *builders]):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"sha256:{total.hexdigest()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
