"""From a checkpoint to an engine folder: validate, export, verify, describe; the folder appears whole or not at all."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.genai import genai_config
from engines.target import Target, load_target
from export.weights import DeployedWeights
from ngpt.checkpoint import Checkpoint, open_checkpoint
from ngpt.errors import BuildError, MissingPackageError, OutputExistsError
from ngpt.weights import Weights

Progress = Callable[[str, float], None]
"""Called as progress(what is being done, fraction done of all)."""
# Protobuf ends at 2 GB, and a file that is mapped beats one that is parsed long before that.
EXTERNAL_DATA_FROM = 64 << 20
_BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int8": 1.125, "int4": 0.625}


def build_engine(
    checkpoint: str | Path,
    target: str,
    output: str | Path,
    *,
    name: str | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Build the engine of a checkpoint for a target; returns the folder.

    An engine that fails parity is still written, with the verdict in its manifest: the report says where it parts ways.
    Raises the checkpoint's errors, TargetError, OutputExistsError, BuildError (disk full, output not writable).
    """
    chosen, folder, report = load_target(target), Path(output), progress or (lambda what, done: None)
    if folder.exists():
        raise OutputExistsError(
            f"{folder} exists", expected="a folder that does not exist yet", remedy="choose another --output, or remove it"
        )
    with open_checkpoint(checkpoint) as opened:
        opened.validate(lambda done, total, what: report(f"checking {what}", 0.2 * done / max(total, 1)))
        with _atomic_folder(folder, _estimate(opened, chosen)) as work:
            weights = DeployedWeights(Weights(opened), half_precision=chosen.precision == "fp16")
            export_graph(weights, chosen, work / "model.onnx", lambda what, part: report(what, 0.2 + 0.5 * part))
            for path in opened.tokenizer_files:
                shutil.copyfile(path, work / path.name)
            _write_json(work / "genai_config.json", genai_config(opened.spec, chosen))
            manifest = _manifest(opened, chosen, name or Path(checkpoint).resolve().name)
            _finish(work, manifest)
            if verify and chosen.executed:
                report("verifying against PyTorch", 0.75)
                manifest["parity"] = verify_folder(work, opened)
                _finish(work, manifest)
            report("done", 1.0)
    return folder


def export_graph(
    weights: DeployedWeights, target: Target, path: Path, progress: Progress | None = None, taps: tuple[str, ...] = ()
) -> None:
    """Write the target's ONNX graph; tensors are read, folded, quantised and written one at a time.

    Raises MissingPackageError when the exporter's packages are not installed.
    """
    try:
        import onnx_ir as ir

        from export.lowerings.onnx import OnnxPortable, OnnxRuntime
    except ImportError as error:
        raise MissingPackageError(f"exporting needs {error.name}", remedy="pip install 'ngpt-deploy[onnx]'") from error
    lowering = OnnxPortable if target.form == "portable" else OnnxRuntime
    model = lowering(weights, target.precision, target.block_size).model(taps)
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None]

    def step(tensor: Any, info: Any) -> None:
        if progress is not None:
            progress(f"writing {tensor.name}", info.index / max(info.total, 1))

    if sum(sizes) < EXTERNAL_DATA_FROM:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=1024, callback=step)


def verify_folder(folder: Path, checkpoint: Checkpoint, *, decode_steps: int = 64, report: Path | None = None) -> dict[str, Any]:
    """Parity of the engine in `folder` with its checkpoint: writes parity.json and parity.html to `report` (default: the
    engine's folder) and returns the summary with the verdict."""
    from engines.parity.verify import PARITY_SLOTS, verify
    from engines.runtime.engine import open_runner
    from engines.runtime.manifest import read_manifest

    manifest = read_manifest(folder)
    target = load_target(manifest.target.name)
    runner = open_runner(folder, manifest, PARITY_SLOTS)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            result = verify(
                runner,
                checkpoint,
                precision=target.precision,
                block_size=target.block_size,
                decode_steps=decode_steps,
                name=f"{manifest.name}, {target.name}",
                taps=tap_function(checkpoint, target, Path(scratch)),
            )
    finally:
        runner.release()
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
    result.write(report or folder)
    return {"verdict": result.verdict, "report": "parity.json", "html": "parity.html", **result.summary}


def tap_function(
    checkpoint: Checkpoint, target: Target, scratch: Path
) -> Callable[[NDArray[np.int64]], dict[str, NDArray[np.float32]]]:
    """A second graph of the same lowering whose hidden states are outputs: ids [T] -> {tap name: float32 [T, E]}."""
    import onnxruntime

    spec = checkpoint.spec
    names = ("embed", *(f"layers.{i}.{part}.update" for i in range(spec.num_layers) for part in ("attn", "mlp")))
    weights = DeployedWeights(Weights(checkpoint), half_precision=target.precision == "fp16")
    export_graph(weights, target, scratch / "taps.onnx", taps=names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(scratch / "taps.onnx"), options, providers=list(target.providers))
    dtype = np.float16 if target.precision == "fp16" else np.float32
    empty = np.zeros((1, spec.num_kv_heads, 0, spec.head_dim), dtype)
    past = {f"past_key_values.{i}.{kind}": empty for i in range(spec.num_layers) for kind in ("key", "value")}

    def run(ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        positions = np.arange(len(ids), dtype=np.int64)[None]
        feeds = past | {"input_ids": ids[None], "attention_mask": np.ones_like(positions), "position_ids": positions}
        return {name: value[0].astype(np.float32) for name, value in zip(names, session.run(list(names), feeds), strict=True)}

    return run


def _estimate(checkpoint: Checkpoint, target: Target) -> int:
    weights = Weights(checkpoint)
    count = sum(int(np.prod(weights.shape(name))) for name in weights.names())
    return int(count * _BYTES_PER_WEIGHT[target.precision]) + (16 << 20)


@contextmanager
def _atomic_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A working folder beside `folder` that takes its name at the end and disappears on any error."""
    parent = folder.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise BuildError(
                f"not enough room on the disk of {parent}", expected=f"about {needed / 1e6:.0f} MB",
                found=f"{free / 1e6:.0f} MB free", remedy="free some, or choose another --output",
            )  # fmt: skip
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=parent))
    except OSError as error:
        raise BuildError(
            f"cannot write to {parent}", found=error.strerror or str(error), remedy="choose another --output"
        ) from error
    try:
        yield work
        work.chmod(0o755)
        os.replace(work, folder)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BuildError(f"the disk of {parent} is full", remedy="free some room and build again") from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputExistsError(f"{folder} appeared while the engine was being built") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _manifest(checkpoint: Checkpoint, target: Target, name: str) -> dict[str, Any]:
    spec = checkpoint.spec
    packages = ("ngpt-deploy", "torch", "transformers", "onnx-ir", "onnxruntime", "numpy")
    return {
        "schema_version": 1,
        "name": name,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "target": {
            "name": target.name,
            "runtime": target.runtime,
            "providers": list(target.providers),
            "precision": target.precision,
            "cache": target.cache,
            "executed": target.executed,
            "note": target.note,
        },
        "model": {
            "architecture": "ngpt",
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "num_layers": spec.num_layers,
            "num_heads": spec.num_heads,
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "max_length": spec.max_length,
            "cache_dtype": "float16" if target.precision == "fp16" else "float32",
            "bos_token_id": spec.bos_token_id,
            "eos_token_ids": list(spec.eos_token_ids),
            "pad_token_id": spec.pad_token_id,
        },
        "graph": "model.onnx",
        "digests": {"weights": checkpoint.digest(), "spec": _prefixed(spec.digest()), "code": code_digest()},
        "tools": {package: found for package in packages if (found := _version(package)) is not None},
        "flags": {key: value for key, value in dataclasses.asdict(target).items() if key in ("form", "block_size")},
        "files": {},
        "parity": None,
    }


def _prefixed(digest: str) -> str:
    return digest if digest.startswith("sha256:") else f"sha256:{digest}"


def _finish(folder: Path, manifest: dict[str, Any]) -> None:
    """List every file with its size and sha256, and write the manifest last."""
    manifest["files"] = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    _write_json(folder / "manifest.json", manifest)


def code_digest() -> str:
    """Digest of the sources that decide what an engine computes: the packages ngpt and export, and this one's builder."""
    root, total = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted([*root.glob("ngpt/**/*.py"), *root.glob("export/**/*.py"), root / "engines" / "build.py"]):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"sha256:{total.hexdigest()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
