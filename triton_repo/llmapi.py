"""Package a Hugging Face checkpoint for the PyTorch runtime of TensorRT-LLM, which loads checkpoints and builds no engine.

Contract-tested with a double of `tensorrt_llm.LLM`; not executed with TensorRT-LLM. One model, `tensorrt_llm`, in Triton's
Python backend, with the interface of the llmapi model in TensorRT-LLM's repository. Unlike `triton_repo.package`, what is
served has no parity verdict.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ngpt.atomic_folder import new_folder
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import PackagingError
from ngpt.text_files import TOKENIZER_FILE, End
from triton_repo.config_pbtxt import pytorch_model
from triton_repo.copies import write_digests
from triton_repo.package import copy_code, copy_files

_FOLDER = "checkpoint"


def package_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    allow_unverified: bool = False,
    modules: Sequence[str | os.PathLike[str]] = (),
    num_slots: int = 8,
    tensor_parallel: int = 1,
    kv_cache_fraction: float | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    eos: Sequence[End] = (),
) -> Path:
    """Write a model repository with the one model ``tensorrt_llm``; whole, or not at all.

    Args:
        checkpoint_dir: a Hugging Face directory with safetensors and a tokenizer; its structure is checked.
        output_dir: the repository; must not exist.
        allow_unverified: must be said, because this runtime has no parity verdict.
        modules: Python files imported before the model is loaded; one of them must register the architecture with TensorRT-LLM.
        num_slots: sequences that are generated at the same time (max_batch_size).
        tensor_parallel: GPUs that share the model.
        kv_cache_fraction: part of the GPU's free memory for keys and values, above 0 to 1; 0.9 if not given.
        tokenizer: a folder or a tokenizer.json to take in place of the checkpoint's.
        eos: the tokens that end a text, ids or the tokenizer's texts, in place of the checkpoint's.

    Returns:
        The repository's path.

    Raises:
        OutputExistsError: ``output_dir`` exists. CheckpointError, ConfigError: not a good checkpoint.
        PackagingError: ``allow_unverified`` not given, a bad option, a missing file, disk trouble.
    """
    source, output = Path(checkpoint_dir), Path(output_dir).absolute()
    if not allow_unverified:
        raise PackagingError(
            f"{source} is a checkpoint: TensorRT-LLM's PyTorch runtime serves it without a parity verdict",
            expected="an engine folder",
            found="no manifest.json",
            remedy="Build an engine, or package the checkpoint with --allow-unverified.",
        )
    for name, value in (("num_slots", num_slots), ("tensor_parallel", tensor_parallel)):
        if value < 1:
            raise PackagingError(name, expected="at least 1", found=str(value))
    kv_cache_fraction = 0.9 if kv_cache_fraction is None else kv_cache_fraction
    if not 0 < kv_cache_fraction <= 1:
        raise PackagingError("kv_cache_fraction", expected="above 0, at most 1", found=str(kv_cache_fraction))
    for wanted in (source / "config.json", *map(Path, modules)):
        if not wanted.is_file():
            raise PackagingError(f"{wanted.name} is needed to serve a checkpoint", expected=str(wanted), found="no such file")
    with open_checkpoint(source, tokenizer=tokenizer, eos=eos) as checkpoint:
        checkpoint.text.check(checkpoint.spec.vocab_size)
        checkpoint.report_notes()
        files, text, config = checkpoint.files, checkpoint.text, checkpoint.config
    if text.tokenizer_file is None:
        raise PackagingError(
            f"{TOKENIZER_FILE} is needed to serve a checkpoint",
            expected=str(source / TOKENIZER_FILE),
            found="no such file",
            remedy="Give one with --tokenizer.",
        )
    settings = {
        "model": _FOLDER,
        "backend": "pytorch",
        "tensor_parallel_size": tensor_parallel,
        "max_batch_size": num_slots,
        "kv_cache_config": {"free_gpu_memory_fraction": kv_cache_fraction},
        "triton_config": {"max_batch_size": 0, "decoupled": True},
    }
    with new_folder(output, kind=PackagingError) as partial:
        version = partial / "tensorrt_llm" / "1"
        version.mkdir(parents=True)
        copy_code(version, "trtllm_pytorch/model.py")
        (version.parent / "config.pbtxt").write_text(pytorch_model(), encoding="utf-8")
        for module in map(Path, modules):
            copy_files(module.parent, (module.name,), version / "modules")
        (version / _FOLDER).mkdir()
        for file in {source / "config.json", *source.glob("*.safetensors.index.json"), *files}:
            shutil.copyfile(file, version / _FOLDER / file.name)
        text.copy_to(version / _FOLDER)
        if text.ends_given:
            (version / _FOLDER / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (version / "model.yaml").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_digests(version, {})
    return output
