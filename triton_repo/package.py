"""Package an engine as a Triton model repository that is complete in itself.

Everything the four models import besides numpy, tokenizers and the runtime library is copied in, so the folder can be
carried to any Triton server with a Python backend.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from string import Template

import engines.runtime
from engines.runtime.compatibility import check_slots
from engines.runtime.errors import ServingError
from engines.runtime.manifest import Manifest, contained_path, read_manifest, verify_files
from ngpt.errors import OutputExistsError, PackagingError

MODELS = ("tensorrt_llm", "preprocessing", "postprocessing", "ensemble")
_HERE = Path(__file__).resolve().parent
_TEMPLATES = _HERE / "templates"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_VERSION = "1"


def package_engine(
    engine_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    allow_unverified: bool = False,
    num_slots: int = 8,
    max_queue: int = 256,
    threads: int | None = None,
    exclude_input_in_output: bool = False,
) -> Path:
    """Write a model repository with the models ``tensorrt_llm``, ``preprocessing``, ``postprocessing`` and ``ensemble``.

    The folder appears at once and whole, or not at all.

    Args:
        engine_dir: an engine folder; every file's size and sha256 is checked against its manifest.
        output_dir: the repository; must not exist.
        allow_unverified: package an engine whose parity verdict is missing or failed.
        num_slots: sequences that are generated at the same time (rows of the key-value cache).
        max_queue: requests that may wait for a slot; further ones are refused with UNAVAILABLE.
        threads: threads of the runtime; its own choice when None.
        exclude_input_in_output: leave the prompt out of unstreamed answers unless a request says otherwise
            (clients of this interface expect it to be in).

    Returns:
        The repository's path.

    Raises:
        OutputExistsError: ``output_dir`` exists.
        PackagingError: not a good engine folder, an engine without a passed parity verdict, bad option, disk trouble.
    """
    engine, output = Path(engine_dir), Path(output_dir).absolute()
    for name, value in (("num_slots", num_slots), ("max_queue", max_queue), ("threads", threads)):
        if value is not None and value < 1:
            raise PackagingError(name, expected="at least 1", found=str(value))
    if output.exists() or output.is_symlink():
        raise OutputExistsError(
            "the output folder is already in use",
            expected="a path that does not exist",
            found=str(output),
            remedy="Choose another folder or remove this one.",
        )
    manifest = _checked_manifest(engine, allow_unverified, num_slots)
    values = _values(manifest, num_slots, max_queue, threads, exclude_input_in_output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise PackagingError("the output folder cannot be made", found=str(error)) from error
    try:
        partial.chmod(0o755)
        for model in MODELS:
            _write_model(partial / model, model, values)
        _copy_engine(engine, manifest, partial / "tensorrt_llm" / _VERSION / "engine")
        for model in ("preprocessing", "postprocessing", "ensemble"):
            _copy_files(engine, _TOKENIZER_FILES, partial / model / _VERSION / "tokenizer")
        partial.rename(output)
    except OSError as error:
        raise PackagingError("the model repository could not be written", found=str(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _checked_manifest(engine: Path, allow_unverified: bool, num_slots: int) -> Manifest:
    try:
        manifest = read_manifest(engine)
        verify_files(engine, manifest)
    except ServingError as error:
        raise PackagingError("this engine cannot be packaged", found=str(error), remedy="Build the engine again.") from error
    try:
        check_slots(manifest, num_slots)
    except ServingError as error:
        raise PackagingError(error.what, expected=error.expected, found=error.found, remedy=error.remedy) from error
    verdict = str(manifest.parity["verdict"]) if manifest.parity is not None else "missing"
    if verdict != "pass" and not allow_unverified:
        raise PackagingError(
            f"the engine {manifest.name} has no passed parity verdict",
            expected="pass",
            found=verdict,
            remedy="Verify the engine, or package it with --allow-unverified.",
        )
    missing = [name for name in _TOKENIZER_FILES[:1] if not (engine / name).is_file()]
    if missing:
        raise PackagingError("the engine has no tokenizer", expected=missing[0], found="nothing")
    return manifest


def _values(manifest: Manifest, num_slots: int, max_queue: int, threads: int | None, exclude_input: bool) -> dict[str, str]:
    """What the config.pbtxt templates leave open."""
    model = manifest.model
    end_id = model.eos_token_ids[0] if model.eos_token_ids else -1
    return {
        "num_slots": str(num_slots),
        "max_queue": str(max_queue),
        "threads": "" if threads is None else str(threads),
        "exclude_input_in_output": "true" if exclude_input else "false",
        "vocab_size": str(model.vocab_size),
        "max_length": str(model.max_length),
        "end_id": str(end_id),
        "pad_id": str(end_id if model.pad_token_id is None else model.pad_token_id),
    }


def _write_model(folder: Path, model: str, values: dict[str, str]) -> None:
    version = folder / _VERSION
    version.mkdir(parents=True)
    config = Template((_TEMPLATES / model / "config.pbtxt").read_text(encoding="utf-8"))
    (folder / "config.pbtxt").write_text(config.substitute(values), encoding="utf-8")
    _copy_files(_TEMPLATES / model, ("model.py",), version)
    _copy_files(_TEMPLATES / "common", ("serving_triton.py", "engine_link.py"), version)
    _copy_files(_HERE, ("serving_inputs.py",), version)
    runtime = Path(engines.runtime.__file__).parent
    shutil.copytree(runtime, version / "runtime", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.txt"))


def _copy_files(source: Path, names: tuple[str, ...], target: Path) -> None:
    """Copy those of the files that exist."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _copy_engine(engine: Path, manifest: Manifest, target: Path) -> None:
    """The manifest and the files it names: nothing else that may lie in the folder."""
    for name in ("manifest.json", *manifest.files):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(contained_path(engine, name), place)
