"""Package an engine as a Triton model repository that is complete in itself.

Everything the models import besides numpy, tokenizers and the runtime library is copied in, so the folder can be
carried to any Triton server with a Python backend. The manifest's runtime decides which repository it is: see LAYOUTS.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
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
from engines.runtime.verdict import standing
from engines.signing import check_signature
from ngpt.atomic_folder import check_free, new_folder
from ngpt.errors import PackagingError
from ngpt.text_files import CHAT_TEMPLATE, End, TextFiles, given_chat_template, given_tokenizer
from triton_repo.config_pbtxt import (
    DEFAULT_NAME,
    Settings,
    alias,
    backend_model,
    ensemble,
    own_model,
    parameters_of,
    postprocessing,
    preprocessing,
    text_model,
)
from triton_repo.copies import write_digests


@dataclass(frozen=True)
class Model:
    """A model of a repository: its config.pbtxt; the templates that it is made of, the first of them its model.py (none: its
    backend brings its own code); whether it goes through a tokenizer, and whether it holds the engine."""

    config: Callable[[Settings], str]
    code: tuple[str, ...] = ()
    text: bool = False
    engine: bool = False


def _own(name: str) -> Model:
    code = ("engine/model.py", "shared/answer.py")
    return Model(lambda settings: own_model(settings.named(name), settings), code, text=True, engine=True)


_PROCESSING = {
    "preprocessing": Model(preprocessing, ("shared/preprocessing.py",), text=True),
    "postprocessing": Model(postprocessing, ("shared/postprocessing.py",), text=True),
}
OWN = {DEFAULT_NAME: _own(DEFAULT_NAME), "tensorrt_llm": Model(alias), **_PROCESSING}
"""This project's scheduler around the engine."""
TOKENS_ALONE = {"tensorrt_llm": _own("tensorrt_llm")}
"""The same around an engine without a tokenizer."""
TENSORRT_LLM = {
    "tensorrt_llm": Model(backend_model, engine=True),
    **_PROCESSING,
    "ensemble": Model(ensemble),
    "tensorrt_llm_bls": Model(
        partial(text_model, "tensorrt_llm_bls"),
        ("trtllm_backend/text.py", "trtllm_backend/link.py", "shared/answer.py"),
        text=True,
    ),
}
"""The engine in TensorRT-LLM's own backend."""
LAYOUTS = {"onnxruntime": OWN, "tensorrt": OWN, "tensorrt_rtx": OWN, "tensorrt_llm": TENSORRT_LLM}
"""By manifest.target.runtime."""
MODELS = tuple(OWN)
_MOST_INSTANCES = 16
_MOST = (1 << 31) - 1  # a count in a repository's configuration has 32 bits
_LOG = logging.getLogger("ngpt")
_HERE = Path(__file__).resolve().parent
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", CHAT_TEMPLATE)
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,98}[A-Za-z0-9])?")


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
    add_special_tokens: bool = True,
    name: str | None = None,
    model_version: int | None = None,
    instances: int | None = None,
    gpus: Sequence[int] = (),
    chat_template: str | os.PathLike[str] | None = None,
    require_signature: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a model repository: ``ensemble``, which holds tokenizer, scheduler and engine, ``tensorrt_llm``, the same by the
    names of a tokens model, ``preprocessing`` and ``postprocessing``.

    An engine of TensorRT-LLM (runtime ``tensorrt_llm``) goes to that library's own backend and gets ``tensorrt_llm_bls``
    besides. An engine without a tokenizer gets ``tensorrt_llm`` alone, which holds it and takes and gives token ids.

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

        add_special_tokens: whether the tokenizer adds its own (a bos) to a prompt unless a request says otherwise.
        chat_template: a jinja2 template in place of the tokenizer's own.
        require_signature: a public key in PEM: the engine must hold a statement that it passed, signed with the private half.
        name: of the model that holds the engine, so that one server can have several; the others become ``NAME_tensorrt_llm``,
            ``NAME_preprocessing`` and ``NAME_postprocessing``.
        model_version: number of the version's folder, 1 if not given.
        instances: processes that each hold the whole engine, 1 if not given; with ``gpus`` on each of them.
        gpus: numbers of the GPUs that instances run on; the runtime's own choice where there are none.

    Of name, model_version, instances and gpus, none is for engines of TensorRT-LLM.

    Returns:
        The repository's path.

    Raises:
        OutputExistsError: ``output_dir`` exists.
        CheckpointError, ConfigError: a tokenizer that cannot be read, or has ids that the model lacks.
        PackagingError: not a good engine folder, an engine without a passed parity verdict, bad option, disk trouble.
    """
    engine, output = Path(engine_dir), Path(output_dir).absolute()
    numbers = {"num_slots": num_slots, "max_queue": max_queue, "prefill_chunk": prefill_chunk, "threads": threads}
    numbers |= {"model_version": model_version, "instances": instances}
    for key, value in numbers.items():
        if value is not None and not 1 <= value <= _MOST:
            raise PackagingError(key, expected="at least 1" if value < 1 else f"at most {_MOST}", found=str(value))
    if name is not None and not _NAME.fullmatch(name):
        raise PackagingError("name", expected="letters, digits, and _ - . between them", found=repr(name)[:100])
    if any(gpu < 0 for gpu in gpus) or len(set(gpus)) < len(gpus):
        raise PackagingError("gpus", expected="numbers of GPUs, each once", found=", ".join(map(str, gpus)))
    if kv_cache_fraction is not None and not 0 < kv_cache_fraction <= 1:
        raise PackagingError("kv_cache_fraction", expected="above 0, at most 1", found=str(kv_cache_fraction))
    if mount is not None and not PurePosixPath(mount).is_absolute():
        raise PackagingError("mount", expected="an absolute path such as /models", found=mount)
    check_free(output, kind=PackagingError)  # before gigabytes are hashed
    manifest = _checked_manifest(engine, allow_unverified, num_slots)
    if require_signature is not None:
        check_signature(engine, manifest, Path(require_signature))
    text = _text_files(engine, manifest, tokenizer, eos)
    if chat_template is not None:
        text.files[CHAT_TEMPLATE] = given_chat_template(chat_template)
    manifest = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, eos_token_ids=text.ends))
    models, theirs = LAYOUTS[manifest.target.runtime], LAYOUTS[manifest.target.runtime] is TENSORRT_LLM
    of_ours = {"threads": threads, "prefill_chunk": prefill_chunk, "name": name, "model_version": model_version}
    _refuse_options_of_others(
        manifest,
        theirs,
        ours=of_ours | {"instances": instances, "gpus": gpus or None},
        theirs={"mount": mount, "kv_cache_fraction": kv_cache_fraction},
    )
    if text.tokenizer_file is None:
        models = {"tensorrt_llm": models["tensorrt_llm"]} if theirs else TOKENS_ALONE
    main = next(key for key, model in models.items() if model.engine)
    folder = str(model_version or 1)
    place = PurePosixPath(mount or "/models") / main / folder / "engine" / _graph_folder(manifest)
    settings = Settings(
        num_slots=num_slots,
        max_queue=max_queue,
        prefill_chunk=PREFILL_CHUNK if prefill_chunk is None else prefill_chunk,
        threads=threads,
        exclude_input=exclude_input_in_output,
        add_special_tokens=add_special_tokens,
        vocab_size=manifest.model.vocab_size,
        max_length=manifest.model.max_length,
        eos_token_ids=manifest.model.eos_token_ids,
        pad_token_id=manifest.model.pad_token_id,
        engine_path=str(place),
        kv_cache_fraction=0.9 if kv_cache_fraction is None else kv_cache_fraction,
        text_instances=min(num_slots, _MOST_INSTANCES),
        instances=instances or 1,
        gpus=tuple(gpus),
        main=main,
        name=name or main,
    )
    needed = sum(entry.bytes for entry in manifest.files.values())
    with new_folder(output, needed=needed, kind=PackagingError) as work:
        for key, model in models.items():
            version = work / settings.named(key) / folder
            version.mkdir(parents=True)
            config = model.config(settings)
            (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
            if model.code:
                copy_code(version, *model.code, runtime=True)
            if model.text and text.tokenizer_file is not None:
                (version / "tokenizer").mkdir()
                text.copy_to(version / "tokenizer")
            if model.code:
                write_digests(version, parameters_of(config))
            if model.engine:
                _copy_engine(engine, manifest, version / "engine")
    return output


def _checked_manifest(engine: Path, allow_unverified: bool, num_slots: int) -> Manifest:
    try:
        manifest = read_manifest(engine)
        verify_files(engine, manifest)
        for name in TOKENIZER_FILES:
            contained_path(engine, name)  # copied where it is there, even if the manifest does not name it
    except ServingError as error:
        raise _unusable(error) from error
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
    try:
        verdict = standing(engine, manifest)
    except ServingError as error:
        raise _unusable(error) from error
    if verdict != "pass" and not allow_unverified:
        raise PackagingError(
            f"the engine {manifest.name} has no passed parity verdict",
            expected="pass",
            found="one that does not say which files it was reached on" if verdict == "unbound" else verdict,
            remedy="Verify it: ngpt-deploy verify ENGINE --checkpoint DIR. Or package it with --allow-unverified.",
        )
    return manifest


def _unusable(error: ServingError) -> PackagingError:
    found = str(error).removesuffix(error.remedy).rstrip(" .")
    return PackagingError("this engine cannot be packaged", found=found, remedy=error.remedy or "Build the engine again.")


def _refuse_options_of_others(
    manifest: Manifest, is_theirs: bool, *, ours: Mapping[str, object], theirs: Mapping[str, object]
) -> None:
    """Raise PackagingError for an option that the engine's runtime would not see."""
    for name, value in (ours if is_theirs else theirs).items():
        if value is not None:
            raise PackagingError(
                f"{name} means nothing to {manifest.name}",
                expected="an engine of " + ("another runtime" if is_theirs else "TensorRT-LLM"),
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
        "copies.py",
        "interface.py",
        "serving_inputs.py",
        "tensors.py",
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
