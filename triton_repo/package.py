"""Package an engine as a Triton model repository that is complete in itself.

Everything the models import besides numpy, tokenizers and the runtime library is copied in, so the folder can be
carried to any Triton server with a Python backend. The manifest's runtime decides which repository it is: see LAYOUTS.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from string import Template

import engines.runtime
from engines.runtime.compatibility import check_slots
from engines.runtime.errors import ServingError
from engines.runtime.manifest import MANIFEST_NAME, Manifest, contained_path, read_manifest, verify_files, write_manifest
from ngpt.errors import PackagingError
from ngpt.folder import check_free, new_folder
from ngpt.text_files import End, TextFiles, given_tokenizer


@dataclass(frozen=True)
class Layout:
    """A kind of repository: the template of each of its models, and the module by which the text models reach the tokens model."""

    models: Mapping[str, str]
    link: str


_PROCESSING = {"preprocessing": "preprocessing", "postprocessing": "postprocessing"}
OWN = Layout({"tensorrt_llm": "tensorrt_llm", **_PROCESSING, "ensemble": "ensemble"}, "engine_link.py")
TENSORRT_LLM = Layout(
    {"tensorrt_llm": "tensorrtllm", **_PROCESSING, "ensemble": "tensorrtllm_ensemble", "tensorrt_llm_bls": "ensemble"},
    "bls_link.py",
)
LAYOUTS = {"onnxruntime": OWN, "tensorrt": OWN, "tensorrt_rtx": OWN, "tensorrt_llm": TENSORRT_LLM}
"""By manifest.target.runtime. OWN: this project's scheduler around the engine. TENSORRT_LLM: the engine in TensorRT-LLM's own backend."""
MODELS = tuple(OWN.models)
_MOST_INSTANCES = 16
_MOST = (1 << 31) - 1  # a count in a repository's configuration has 32 bits
_WITH_TOKENIZER = ("preprocessing", "postprocessing", "ensemble")
_LOG = logging.getLogger("ngpt")
_HERE = Path(__file__).resolve().parent
_TEMPLATES = _HERE / "templates"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
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
    mount: str | None = None,
    kv_cache_fraction: float | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    eos: Sequence[End] = (),
) -> Path:
    """Write a model repository with the models ``tensorrt_llm``, ``preprocessing``, ``postprocessing`` and ``ensemble``.

    An engine of TensorRT-LLM (runtime ``tensorrt_llm``) goes to that library's own backend and gets ``tensorrt_llm_bls`` besides. An engine
    without a tokenizer gets ``tensorrt_llm`` alone, which takes and gives token ids.

    The folder appears at once and whole, or not at all.

    Args:
        engine_dir: an engine folder; every file's size and sha256 is checked against its manifest.
        output_dir: the repository; must not exist.
        allow_unverified: package an engine whose parity verdict is missing or failed.
        num_slots: sequences that are generated at the same time (rows of the key-value cache).
        max_queue: requests that may wait for a slot; further ones are refused with UNAVAILABLE.
        threads: threads of the runtime; its own choice when None. Not for engines of TensorRT-LLM.
        exclude_input_in_output: leave the prompt out of unstreamed answers unless a request says otherwise
            (clients of this interface expect it to be in).
        mount: absolute path at which the repository will lie where it is served, /models if not given: TensorRT-LLM's backend is given the
            engine's path. For its engines alone.
        tokenizer: a folder or a tokenizer.json to take in place of the engine's; where the engine knows no token that ends a text,
            the one that this tokenizer names.
        eos: the tokens that end a text, ids or the tokenizer's texts, in place of the engine's.
        kv_cache_fraction: part of the GPU's free memory that TensorRT-LLM's backend takes for keys and values, above 0 to 1; 0.9 if not
            given. For its engines alone.

    Returns:
        The repository's path.

    Raises:
        OutputExistsError: ``output_dir`` exists.
        CheckpointError, ConfigError: a tokenizer that cannot be read, or has ids that the model lacks.
        PackagingError: not a good engine folder, an engine without a passed parity verdict, bad option, disk trouble.
    """
    engine, output = Path(engine_dir), Path(output_dir).absolute()
    for name, value in (("num_slots", num_slots), ("max_queue", max_queue), ("threads", threads)):
        if value is not None and not 1 <= value <= _MOST:
            raise PackagingError(name, expected="at least 1" if value < 1 else f"at most {_MOST}", found=str(value))
    if kv_cache_fraction is not None and not 0 < kv_cache_fraction <= 1:
        raise PackagingError("kv_cache_fraction", expected="above 0, at most 1", found=str(kv_cache_fraction))
    if mount is not None and not PurePosixPath(mount).is_absolute():
        raise PackagingError("mount", expected="an absolute path such as /models", found=mount)
    check_free(output, kind=PackagingError)  # before gigabytes are hashed
    manifest = _checked_manifest(engine, allow_unverified, num_slots)
    text = _text_files(engine, manifest, tokenizer, eos)
    manifest = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, eos_token_ids=text.ends))
    layout = LAYOUTS[manifest.target.runtime]
    _refuse_options_of_others(manifest, layout, threads=threads, mount=mount, kv_cache_fraction=kv_cache_fraction)
    models = layout.models if text.tokenizer_file is not None else {"tensorrt_llm": layout.models["tensorrt_llm"]}
    values = _values(manifest, num_slots, max_queue, threads, exclude_input_in_output)
    values["engine_path"] = str(
        PurePosixPath(mount or "/models") / "tensorrt_llm" / _VERSION / "engine" / _graph_folder(manifest)
    )
    values["kv_cache_fraction"] = str(0.9 if kv_cache_fraction is None else kv_cache_fraction)
    # Calls to another model are made one at a time in each process: several at once can hang the Python backend.
    in_turn = layout.link == "bls_link.py"
    values |= {"in_turn": str(in_turn).lower(), "text_instances": str(min(num_slots, _MOST_INSTANCES) if in_turn else 1)}
    needed = sum(entry.bytes for entry in manifest.files.values())
    with new_folder(output, needed=needed, kind=PackagingError) as partial:
        for model in models:
            _write_model(partial / model, model, layout, values)
        _copy_engine(engine, manifest, partial / "tensorrt_llm" / _VERSION / "engine")
        for model in (model for model, template in models.items() if template in _WITH_TOKENIZER):
            place = partial / model / _VERSION / "tokenizer"
            place.mkdir()
            text.copy_to(place)
    return output


def _checked_manifest(engine: Path, allow_unverified: bool, num_slots: int) -> Manifest:
    try:
        manifest = read_manifest(engine)
        verify_files(engine, manifest)
        for name in TOKENIZER_FILES:
            contained_path(engine, name)  # copied where it is there, even if the manifest does not name it
    except ServingError as error:
        raise PackagingError("this engine cannot be packaged", found=str(error), remedy="Build the engine again.") from error
    try:
        check_slots(manifest, num_slots)
    except ServingError as error:
        raise PackagingError(error.what, expected=error.expected, found=error.found, remedy=error.remedy) from error
    if manifest.target.runtime not in LAYOUTS:
        raise PackagingError(
            f"no repository serves the runtime of {manifest.name}", expected=", ".join(LAYOUTS), found=manifest.target.runtime
        )
    if LAYOUTS[manifest.target.runtime] is TENSORRT_LLM:
        _check_batch(engine, manifest, num_slots)
    verdict = str(manifest.parity["verdict"]) if manifest.parity is not None else "missing"
    if verdict != "pass" and not allow_unverified:
        raise PackagingError(
            f"the engine {manifest.name} has no passed parity verdict",
            expected="pass",
            found=verdict,
            remedy="Verify the engine, or package it with --allow-unverified.",
        )
    return manifest


def _refuse_options_of_others(manifest: Manifest, layout: Layout, **options: object) -> None:
    """Raise PackagingError for an option that the engine's runtime would not see."""
    foreign = ("threads",) if layout is TENSORRT_LLM else ("mount", "kv_cache_fraction")
    for name in foreign:
        if options[name] is not None:
            raise PackagingError(
                f"{name} means nothing to {manifest.name}",
                expected="an engine of " + ("another runtime" if layout is TENSORRT_LLM else "TensorRT-LLM"),
                found=manifest.target.runtime,
                remedy=f"Leave --{name.replace('_', '-')} out.",
            )


def _text_files(engine: Path, manifest: Manifest, tokenizer: str | os.PathLike[str] | None, eos: Sequence[End]) -> TextFiles:
    """The tokenizer that text goes through, held against the model's vocabulary, and the tokens that end a text."""
    if tokenizer is None:
        own = {name: contained_path(engine, name) for name in TOKENIZER_FILES}
        text = TextFiles({name: path for name, path in own.items() if path.is_file()})
    else:
        given = given_tokenizer(tokenizer)
        text = TextFiles({name: path for name, path in given.items() if name in TOKENIZER_FILES})
    text.settle(manifest.model.eos_token_ids, manifest.model.vocab_size, ends=eos, from_tokenizer=tokenizer is not None)
    text.check(manifest.model.vocab_size)
    if text.tokenizer_file is None:
        text.notes += ("there is no tokenizer, so the repository takes and gives token ids alone; --tokenizer adds one",)
    for note in text.notes:
        _LOG.warning("%s: %s", engine, note)
    return text


def _check_batch(engine: Path, manifest: Manifest, num_slots: int) -> None:
    """The slots must not exceed the batch that trtllm-build wrote into the engine's config.json."""
    try:
        text = (engine / _graph_folder(manifest) / "config.json").read_text(encoding="utf-8")
        most = int(json.loads(text)["build_config"]["max_batch_size"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise PackagingError(
            f"{manifest.name} has no readable config.json of trtllm-build", expected="build_config.max_batch_size",
            found=f"{type(error).__name__}: {error}"[:300], remedy="Build the engine again.",
        ) from error  # fmt: skip
    if num_slots > most:
        raise PackagingError(
            f"num_slots is above what {manifest.name} was built for", expected=f"at most {most} (max_batch_size)",
            found=str(num_slots), remedy=f"Ask for {most} slots, or build the engine with a larger max_batch_size.",
        )  # fmt: skip


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
        "eos_token_ids": ",".join(str(token) for token in model.eos_token_ids),
        "pad_id": str(end_id if model.pad_token_id is None else model.pad_token_id),
    }


def _write_model(folder: Path, model: str, layout: Layout, values: dict[str, str]) -> None:
    template, version = _TEMPLATES / layout.models[model], folder / _VERSION
    version.mkdir(parents=True)
    config = Template((template / "config.pbtxt").read_text(encoding="utf-8"))
    (folder / "config.pbtxt").write_text(config.substitute(values, model=model), encoding="utf-8")
    if not (template / "model.py").is_file():
        return  # the backend brings its own code
    copy_files(template, ("model.py",), version)
    copy_files(_TEMPLATES / "common", ("serving_triton.py",), version)
    shutil.copyfile(_TEMPLATES / "common" / layout.link, version / "engine_link.py")
    copy_files(_HERE, ("serving_inputs.py",), version)
    copy_runtime(version)


def copy_runtime(version: Path) -> None:
    """Copy engines.runtime, under the name by which the models import it."""
    runtime = Path(engines.runtime.__file__).parent
    shutil.copytree(runtime, version / "runtime", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.txt"))


def copy_files(source: Path, names: tuple[str, ...], target: Path) -> None:
    """Copy those of the files that exist."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _graph_folder(manifest: Manifest) -> PurePosixPath:
    """Where the engine's own files lie in its folder; TensorRT-LLM's lie in one beside the checkpoint they were built from."""
    return PurePosixPath(manifest.graph).parent


def _copy_engine(engine: Path, manifest: Manifest, target: Path) -> None:
    """The manifest and the files it names in the graph's folder: nothing else that may lie there, and not what it was built from."""
    for name in (n for n in manifest.files if PurePosixPath(n).is_relative_to(_graph_folder(manifest))):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(contained_path(engine, name), place)
    if manifest == read_manifest(engine):
        shutil.copyfile(engine / MANIFEST_NAME, target / MANIFEST_NAME)
    else:  # with tokens that end a text, which the engine did not know
        write_manifest(target, manifest)
