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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import engines.runtime
from engines.runtime.compatibility import check_slots
from engines.runtime.engine import PREFILL_CHUNK
from engines.runtime.errors import ServingError
from engines.runtime.manifest import MANIFEST_NAME, Manifest, contained_path, read_manifest, verify_files, write_manifest
from ngpt.atomic_folder import check_free, new_folder
from ngpt.errors import PackagingError
from ngpt.text_files import End, TextFiles, given_tokenizer
from triton_repo.config_pbtxt import Settings, backend_model, ensemble, postprocessing, preprocessing, text_model, tokens_model


@dataclass(frozen=True)
class Model:
    """A model of a repository: its config.pbtxt, the Python file that is its model.py (None: its backend brings its own
    code), and whether it goes through a tokenizer."""

    config: Callable[[Settings], str]
    code: str | None
    text: bool = True


@dataclass(frozen=True)
class Layout:
    """A kind of repository: its models by name, and the folder of templates whose link leads from text models to the tokens
    model."""

    models: Mapping[str, Model]
    link: str


_PROCESSING = {
    "preprocessing": Model(preprocessing, "engine/preprocessing.py"),
    "postprocessing": Model(postprocessing, "engine/postprocessing.py"),
}
OWN = Layout(
    {
        "tensorrt_llm": Model(tokens_model, "engine/tokens.py", text=False),
        **_PROCESSING,
        "ensemble": Model(partial(text_model, "ensemble"), "engine/text.py"),
    },
    "engine",
)
TENSORRT_LLM = Layout(
    {
        "tensorrt_llm": Model(backend_model, None, text=False),
        **_PROCESSING,
        "ensemble": Model(ensemble, None, text=False),
        "tensorrt_llm_bls": Model(partial(text_model, "tensorrt_llm_bls"), "engine/text.py"),
    },
    "trtllm_backend",
)
LAYOUTS = {"onnxruntime": OWN, "tensorrt": OWN, "tensorrt_rtx": OWN, "tensorrt_llm": TENSORRT_LLM}
"""By manifest.target.runtime. OWN: this project's scheduler around the engine. TENSORRT_LLM: the engine in TensorRT-LLM's
own backend."""
MODELS = tuple(OWN.models)
_MOST_INSTANCES = 16
_MOST = (1 << 31) - 1  # a count in a repository's configuration has 32 bits
_LOG = logging.getLogger("ngpt")
_HERE = Path(__file__).resolve().parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_VERSION = "1"


def package_engine(
    engine_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    allow_unverified: bool = False,
    num_slots: int = 8,
    max_queue: int = 256,
    prefill_chunk: int | None = None,
    threads: int | None = None,
    exclude_input_in_output: bool = False,
    mount: str | None = None,
    kv_cache_fraction: float | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    eos: Sequence[End] = (),
) -> Path:
    """Write a model repository with the models ``tensorrt_llm``, ``preprocessing``, ``postprocessing`` and ``ensemble``.

    An engine of TensorRT-LLM (runtime ``tensorrt_llm``) goes to that library's own backend and gets ``tensorrt_llm_bls``
    besides. An engine without a tokenizer gets ``tensorrt_llm`` alone, which takes and gives token ids.

    The folder appears at once and whole, or not at all.

    Args:
        engine_dir: an engine folder; every file's size and sha256 is checked against its manifest.
        output_dir: the repository; must not exist.
        allow_unverified: package an engine whose parity verdict is missing or failed.
        num_slots: sequences that are generated at the same time (rows of the key-value cache).
        max_queue: requests that may wait for a slot; further ones are refused with UNAVAILABLE.
        prefill_chunk: most tokens of a prompt that are read in one step, 256 if not given: fewer let others wait less. Not
            for engines of TensorRT-LLM, whose steps were sized when they were built.
        threads: threads of the runtime; its own choice when None. Not for engines of TensorRT-LLM.
        exclude_input_in_output: leave the prompt out of unstreamed answers unless a request says otherwise
            (clients of this interface expect it to be in).
        mount: absolute path at which the repository will lie where it is served, /models if not given: TensorRT-LLM's
            backend is given the engine's path. For its engines alone.
        tokenizer: a folder or a tokenizer.json to take in place of the engine's; where the engine knows no token that ends a
            text, the one that this tokenizer names.
        eos: the tokens that end a text, ids or the tokenizer's texts, in place of the engine's.
        kv_cache_fraction: part of the GPU's free memory that TensorRT-LLM's backend takes for keys and values, above 0 to 1;
            0.9 if not given. For its engines alone.

    Returns:
        The repository's path.

    Raises:
        OutputExistsError: ``output_dir`` exists.
        CheckpointError, ConfigError: a tokenizer that cannot be read, or has ids that the model lacks.
        PackagingError: not a good engine folder, an engine without a passed parity verdict, bad option, disk trouble.
    """
    engine, output = Path(engine_dir), Path(output_dir).absolute()
    numbers = {"num_slots": num_slots, "max_queue": max_queue, "prefill_chunk": prefill_chunk, "threads": threads}
    for name, value in numbers.items():
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
    _refuse_options_of_others(
        manifest, layout, threads=threads, prefill_chunk=prefill_chunk, mount=mount, kv_cache_fraction=kv_cache_fraction
    )
    models = layout.models if text.tokenizer_file is not None else {"tensorrt_llm": layout.models["tensorrt_llm"]}
    # Calls to another model are made one at a time in each process: several at once can hang the Python backend.
    in_turn = layout is TENSORRT_LLM
    place = PurePosixPath(mount or "/models") / "tensorrt_llm" / _VERSION / "engine" / _graph_folder(manifest)
    settings = Settings(
        num_slots=num_slots,
        max_queue=max_queue,
        prefill_chunk=PREFILL_CHUNK if prefill_chunk is None else prefill_chunk,
        threads=threads,
        exclude_input=exclude_input_in_output,
        vocab_size=manifest.model.vocab_size,
        max_length=manifest.model.max_length,
        eos_token_ids=manifest.model.eos_token_ids,
        pad_token_id=manifest.model.pad_token_id,
        link=layout.link,
        engine_path=str(place),
        kv_cache_fraction=0.9 if kv_cache_fraction is None else kv_cache_fraction,
        in_turn=in_turn,
        text_instances=min(num_slots, _MOST_INSTANCES) if in_turn else 1,
    )
    needed = sum(entry.bytes for entry in manifest.files.values())
    with new_folder(output, needed=needed, kind=PackagingError) as work:
        for name, model in models.items():
            version = work / name / _VERSION
            version.mkdir(parents=True)
            (work / name / "config.pbtxt").write_text(model.config(settings), encoding="utf-8")
            if model.code is not None:
                copy_code(version, model.code, f"{layout.link}/link.py", runtime=True)
            if model.text:
                (version / "tokenizer").mkdir()
                text.copy_to(version / "tokenizer")
        _copy_engine(engine, manifest, work / "tensorrt_llm" / _VERSION / "engine")
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
    foreign = ("threads", "prefill_chunk") if layout is TENSORRT_LLM else ("mount", "kv_cache_fraction")
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
            f"{manifest.name} has no readable config.json of trtllm-build",
            expected="build_config.max_batch_size",
            found=f"{type(error).__name__}: {error}"[:300],
            remedy="Build the engine again.",
        ) from error
    if num_slots > most:
        raise PackagingError(
            f"num_slots is above what {manifest.name} was built for",
            expected=f"at most {most} (max_batch_size)",
            found=str(num_slots),
            remedy=f"Ask for {most} slots, or build the engine with a larger max_batch_size.",
        )


def copy_code(version: Path, model: str, *templates: str, runtime: bool = False) -> None:
    """What a Python model imports, under the names it has here: `model` of the templates as model.py, and those it needs
    beside it."""
    shutil.copyfile(_HERE / "templates" / model, version / "model.py")
    for name in (
        "interface.py",
        "serving_inputs.py",
        *(f"templates/{name}" for name in ("shared/python_backend.py", *templates)),
    ):
        target = version / "triton_repo" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_HERE / name, target)
    if runtime:
        source = Path(engines.runtime.__file__).parent
        shutil.copytree(source, version / "engines" / "runtime", ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.txt"))
    for package in [path.parent for path in version.rglob("*.py")]:
        while package != version:
            (package / "__init__.py").touch()
            package = package.parent


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
    """The manifest and the files it names in the graph's folder: nothing else that may lie there, and not what it was built
    from."""
    for name in (n for n in manifest.files if PurePosixPath(n).is_relative_to(_graph_folder(manifest))):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(contained_path(engine, name), place)
    if manifest == read_manifest(engine):
        shutil.copyfile(engine / MANIFEST_NAME, target / MANIFEST_NAME)
    else:  # with tokens that end a text, which the engine did not know
        write_manifest(target, manifest)
