"""From a checkpoint to an engine folder: validate, export, verify, describe; the folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.device import detect, target_for
from engines.genai import genai_config
from engines.hub_config import hub_config
from engines.onnx_graph import export_graph, tap_function
from engines.plan import build_plan
from engines.runtime.errors import ServingError
from engines.sizing import check_fits
from engines.target import AUTO, DEFAULT, Profile, Target, load_target, with_kv_cache
from export.lowerings.tensorrt_layers import ARITHMETIC
from export.lowerings.tensorrt_library import Library, load_library
from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt.checkpoint import Checkpoint, open_checkpoint
from ngpt.checkpoint.base import OffSphere
from ngpt.errors import BuildError, TargetError, os_trouble
from ngpt.folder import check_free, new_folder
from ngpt.progress import Progress, part_of, silent
from ngpt.text_files import End
from ngpt.weights import Weights

ONNX_NAME, PLAN_NAME = "model.onnx", "model.engine"
MAX_NAME = 200
_NUMPY = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.125, "fp8": 1.0, "int4": 0.625}


def build_engine(
    checkpoint: str | Path,
    target: str | Target,
    output: str | Path,
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
    progress: Progress = silent,
) -> Path:
    """Build the engine of a checkpoint for a target; returns the folder.

    An engine that fails parity is still written, with the verdict in its manifest: the report says where it parts ways.
    Target "auto" is the one of this machine's GPU, or the default where there is none; `precision` is one that the target
    offers. Verified where the engine can run on this machine. `tp` and `pp` divide it among GPUs, and
    `kv_cache` "fp8" halves the cache (TensorRT-LLM targets alone, which `engines.trtllm` builds). `off_sphere` "allow" builds what the
    file says where its matrices are far from unit norm. `tokenizer` (a folder or a tokenizer.json) and `eos` (ids, or texts of the
    tokenizer) take the place of the checkpoint's own tokenizer and end tokens. What is unusual about the checkpoint is logged as a
    warning, and recorded.
    Raises the checkpoint's errors, TargetError (unknown, or a card the model does not fit), OutputExistsError, MissingPackageError,
    BuildError (disk full, output not writable, refused by the runtime's builder).
    """
    engine_name(name, checkpoint)  # refused before anything is read
    chosen = with_kv_cache(choose_target(target, precision), kv_cache)
    folder = Path(output)
    opening: dict[str, Any] = {"off_sphere": off_sphere, "tokenizer": tokenizer, "eos": eos}
    if chosen.runtime == "tensorrt_llm":
        from engines.trtllm import build_trtllm

        return build_trtllm(checkpoint, chosen, folder, Parallel(tp, pp), opening=opening, name=name, progress=progress)
    if (tp, pp) != (1, 1):
        raise TargetError(
            f"the target {chosen.name} is one GPU's", expected="--tp 1 --pp 1", found=f"--tp {tp} --pp {pp}",
            remedy="choose a TensorRT-LLM target",
        )  # fmt: skip
    library = None if chosen.on_onnx else load_library(chosen.runtime)  # refused before anything is read
    check_free(folder)
    with open_checkpoint(checkpoint, **opening) as opened:
        if chosen.gpu is not None:
            check_fits(opened.spec, chosen)
        opened.validate(part_of(progress, 0.0, 0.2))
        opened.report_notes()
        # While it is verified, a second graph with outputs for its hidden states lies beside the first.
        graphs = 2 if verify and chosen.on_onnx else 1
        with new_folder(folder, needed=_estimate(opened, chosen) * graphs) as work:
            flags = _write_network(opened, chosen, library, work, part_of(progress, 0.2, 0.7))
            opened.text.copy_to(work)
            manifest = describe(opened, chosen, library, engine_name(name, checkpoint), flags)
            finish(work, manifest)
            if verify and runs_here(chosen):
                progress("verifying against PyTorch", 0.75)
                try:
                    manifest["parity"] = verify_folder(work, opened, scratch=work.parent)
                except ServingError as error:
                    if chosen.on_onnx:
                        raise
                    # Minutes of building are not thrown away because the card is busy or a driver is old: the engine says that it is
                    # unverified and why, and the packager refuses it.
                    manifest["target"]["note"] = f"could not be run here: {error}"[:2000]
                finish(work, manifest)
            progress("done", 1.0)
    return folder


def choose_target(name: str | Target, precision: str | None = None) -> Target:
    """A target by name, or as it is; "auto" is the one of this machine's GPU, else the default. Raises TargetError."""
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


def _write_network(
    checkpoint: Checkpoint, target: Target, library: Library | None, work: Path, progress: Progress
) -> dict[str, Any]:
    """Write the engine's network into `work`; returns what the manifest says of it beside the target's own fields."""
    half = arithmetic(target.precision, target.on_onnx) == "fp16"
    weights = DeployedWeights(Weights(checkpoint), half_precision=half)
    flags = {"form": target.form, "block_size": target.block_size}
    if library is None:
        graph = export_graph(weights, target, work / ONNX_NAME, progress)
        _write_json(work / "genai_config.json", genai_config(checkpoint.spec, target, graph.cache_channels))
        _write_json(work / "config.json", hub_config(checkpoint.spec, target, graph))
        return flags
    assert target.gpu is not None and target.profile is not None
    batch = min(check_fits(checkpoint.spec, target).rows, target.profile.decode_batch)
    tokens = min(target.profile.prefill_tokens, checkpoint.spec.max_length)
    profile = Profile(prefill_tokens=tokens, decode_batch=batch)
    build_plan(weights, dataclasses.replace(target, profile=profile), library, work / PLAN_NAME, progress=progress)
    return flags | dataclasses.asdict(profile) | {"compute_capability": target.gpu.compute_capability or None}


def arithmetic(precision: str, on_onnx: bool) -> str:
    """The type an engine computes in: int8 and int4 are widths of weights."""
    return {"int8": "fp32", "int4": "fp32"}.get(precision, precision) if on_onnx else ARITHMETIC[precision]


def verify_folder(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    decode_steps: int | None = None,
    report: Path | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """Parity of the engine in `folder` with its checkpoint: writes parity.json and parity.html to `report` (default: the
    engine's folder) and returns the summary with the verdict. `scratch`: where a second graph as large as the first may lie meanwhile.
    Raises BuildError before anything is run where the report cannot be written."""
    from engines.parity.verify import PARITY_SLOTS, verify
    from engines.runtime.compatibility import slots_for
    from engines.runtime.engine import open_runner
    from engines.runtime.manifest import read_manifest

    manifest = read_manifest(folder)
    if report is not None:
        try:
            report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found, remedy = os_trouble(error)
            raise BuildError(f"the report cannot be written to {report}", found=found, remedy=remedy) from error
    target = load_target(manifest.target.name, manifest.target.precision)
    runner = open_runner(folder, manifest, slots_for(manifest, PARITY_SLOTS))
    try:
        with tempfile.TemporaryDirectory(dir=scratch) as graphs:
            result = verify(
                runner,
                checkpoint,
                precision=target.precision,
                runtime=target.runtime,
                block_size=target.block_size,
                decode_steps=decode_steps,
                name=f"{manifest.name}, {target.name}",
                # A plan has no hidden states to look at: its logits alone are compared.
                taps=tap_function(checkpoint, target, Path(graphs)) if target.on_onnx else None,
            )
    finally:
        runner.release()
    result.write(report or folder)
    return {"verdict": result.verdict, "report": "parity.json", "html": "parity.html", **result.summary}


def _estimate(checkpoint: Checkpoint, target: Target) -> int:
    weights = Weights(checkpoint)
    count = sum(math.prod(weights.shape(name)) for name in weights.names())
    # A plan is built from a scratch file of the same weights.
    return int(count * BYTES_PER_WEIGHT[target.precision]) * (1 if target.on_onnx else 2) + (16 << 20)


def describe(checkpoint: Checkpoint, target: Target, library: Library | None, name: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an engine, its files and verdict not yet in it."""
    spec = checkpoint.spec
    packages = ["ngpt-deploy", "torch", "transformers", "numpy", *(["onnx-ir", "onnxruntime"] if target.on_onnx else [])]
    tools = {package: found for package in packages if (found := _version(package)) is not None}
    if library is not None:
        tools[library.name] = library.version
    return {
        "schema_version": 1,
        "name": name,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "target": {
            "name": target.name,
            "runtime": target.runtime,
            "providers": list(target.providers),
            "precision": target.precision,
            "cache": target.cache if library is None or library.has_cache_update else "past-present",
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
            "cache_dtype": "float8_e4m3" if target.kv_cache == "fp8" else _NUMPY[arithmetic(target.precision, target.on_onnx)],
            "bos_token_id": spec.bos_token_id,
            "eos_token_ids": list(spec.eos_token_ids),
            "pad_token_id": spec.pad_token_id,
        },
        "graph": ONNX_NAME if target.on_onnx else PLAN_NAME,
        "digests": {"weights": checkpoint.digest(), "spec": _prefixed(spec.digest()), "code": code_digest()},
        "tools": tools,
        "flags": flags | ({"checkpoint_notes": list(checkpoint.notes)} if checkpoint.notes else {}),
        "files": {},
        "generation": checkpoint.text.sampling,
        "parity": None,
    }


def engine_name(name: str | None, checkpoint: str | Path) -> str:
    """The name as it was given, or that of the checkpoint's folder. Raises BuildError for one that cannot be shown."""
    if name is None:
        folder = Path(checkpoint)
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # opening it says what is wrong with the path
            folder = folder.resolve()
        return "".join(letter if letter.isprintable() else "?" for letter in folder.name) or "ngpt"
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise BuildError(
            "the engine's name", expected=f"1 to {MAX_NAME} characters that can be printed", found=ascii(name)[:80],
            remedy="choose another --name",
        )  # fmt: skip
    return name


def _prefixed(digest: str) -> str:
    return digest if digest.startswith("sha256:") else f"sha256:{digest}"


def finish(folder: Path, manifest: dict[str, Any]) -> None:
    """List every file with its size and sha256, and write the manifest last."""
    manifest["files"] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest["files"][path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    _write_json(folder / "manifest.json", manifest)


def code_digest() -> str:
    """Digest of the sources that decide what an engine computes: the packages ngpt and export, and this one's builder."""
    root, total = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(
        [
            *root.glob("ngpt/**/*.py"),
            *root.glob("export/**/*.py"),
            *root.glob("export/plugins/*.cu*"),
            *(root / "engines" / name for name in ("build.py", "onnx_graph.py", "plan.py", "trtllm.py")),
        ]
    ):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"sha256:{total.hexdigest()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
