"""TensorRT-LLM engines: convert the checkpoint, then run `trtllm-build` where it is installed, else say how to run it.

    OUTPUT/checkpoint/    config.json, rank{i}.safetensors           (`export.trtllm.convert`)
    OUTPUT/build.sh       the `trtllm-build` command, to be run in NVIDIA's container
    OUTPUT/BUILD.md       what to do with it
    OUTPUT/engine/        rank{i}.engine, config.json                only where trtllm-build ran
    OUTPUT/manifest.json                                             likewise

Options of trtllm-build read at NVIDIA/TensorRT-LLM commits 65f1d153 (tensorrt_llm/commands/build.py) and 008b2b8d (builder.py).
Contract-tested with a stand-in that loads the checkpoint through a double; trtllm-build itself has not been run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import export.trtllm
from engines.build import BYTES_PER_WEIGHT, describe, engine_name, finish
from engines.sizing import check_fits
from engines.target import Target
from export.lowerings.tensorrt_layers import ARITHMETIC
from export.trtllm.config import ARCHITECTURE, storage_dtype, trtllm_config
from export.trtllm.convert import convert
from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt.checkpoint import Checkpoint, open_checkpoint
from ngpt.errors import BuildError
from ngpt.folder import check_free, new_folder
from ngpt.progress import Progress, part_of, silent
from ngpt.spec import NGPTSpec
from ngpt.weights import Weights

VERSION = "1.2.1"
_PROGRAM = "trtllm-build"
_ROOT = Path(export.trtllm.__file__).parents[2]
_MODEL_FILE = Path(export.trtllm.__file__).with_name("model_file.py")


def build_trtllm(
    checkpoint: str | Path,
    target: Target,
    folder: Path,
    parallel: Parallel,
    *,
    opening: Mapping[str, Any] | None = None,
    name: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Make the output folder, whole or not at all; it has a manifest.json if trtllm-build ran.

    `opening`: options of `open_checkpoint`. Raises the checkpoint's errors, UnsupportedError (sizes that cannot be divided), TargetError (a rank that does not fit the card),
    OutputExistsError, BuildError (disk full, or trtllm-build failed: its last lines are in the message).
    """
    check_free(folder)
    with open_checkpoint(checkpoint, **(opening or {})) as opened:
        _check(opened.spec, target, parallel)
        opened.validate(part_of(progress, 0.0, 0.2))
        opened.report_notes()
        program = shutil.which(_PROGRAM)
        with new_folder(folder, needed=_bytes(opened, target) * (1 if program is None else 3)) as work:
            (work / "checkpoint").mkdir()
            convert(
                deployed(opened, target), work / "checkpoint", parallel, target.precision,
                part_of(progress, 0.2, 0.8), kernels=_kernels(target), kv_cache=target.kv_cache,
            )  # fmt: skip
            opened.text.copy_to(work)
            arguments = build_arguments(opened.spec, target, parallel)
            (work / "build.sh").write_text(_script(arguments), encoding="utf-8")
            (work / "build.sh").chmod(0o755)
            (work / "BUILD.md").write_text(instructions(target, parallel), encoding="utf-8")
            if program is not None:
                progress(f"{_PROGRAM} (minutes)", 0.8)
                version = _run(program, work, arguments, parallel)
                flags: dict[str, Any] = {"form": target.form, "tp": parallel.tp, "pp": parallel.pp, "kv_cache": target.kv_cache}
                flags["trtllm_build"] = arguments
                manifest = describe(opened, target, None, engine_name(name, checkpoint), flags)
                manifest["graph"] = "engine/rank0.engine"
                manifest["tools"]["tensorrt_llm"] = version
                finish(work, manifest)
            progress("done", 1.0)
    return folder


def deployed(checkpoint: Checkpoint, target: Target) -> DeployedWeights:
    """The weights of a target's precision."""
    return DeployedWeights(Weights(checkpoint), half_precision=ARITHMETIC[target.precision] == "fp16")


def build_arguments(spec: NGPTSpec, target: Target, parallel: Parallel) -> list[str]:
    """Options of trtllm-build, folders excepted.

    Packed tokens and a paged cache allow in-flight batching; paged context attention, chunked prefill. FP8 attention stays off: it wants
    a scale of the attention's output that only TensorRT-LLM's own attention module carries. So does paged context attention over an fp8
    cache, which the builder gives up without fp8 weights and for which it turns FP8 attention on with them (builder.py, `build`): with that
    cache it is off, and a prompt is one step. There is no float32 fused attention.
    """
    assert target.profile is not None
    dtype, fused = storage_dtype(target.precision), "disable" if target.precision == "fp32" else "enable"
    paged = "disable" if target.kv_cache == "fp8" else fused
    length = spec.max_length
    values = {
        "model_cls_name": ARCHITECTURE,
        "gpt_attention_plugin": dtype,
        "gemm_plugin": dtype,
        "remove_input_padding": "enable",
        "kv_cache_type": "paged",
        "context_fmha": fused,
        "use_paged_context_fmha": paged,
        "use_fp8_context_fmha": "disable",
        "max_batch_size": target.profile.decode_batch,
        "max_seq_len": length,
        "max_input_len": length,
        # Without chunks a whole prompt is one step.
        "max_num_tokens": target.profile.prefill_tokens if paged == "enable" else max(target.profile.prefill_tokens, length),
        "workers": parallel.world,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def dry_run(
    checkpoint: str | Path, target: Target, folder: Path, parallel: Parallel, opening: Mapping[str, Any] | None = None
) -> str:
    """What `build_trtllm` would do, in words. Reads the checkpoint's header only and writes nothing; raises as it does."""
    with open_checkpoint(checkpoint, **(opening or {})) as opened:
        _check(opened.spec, target, parallel)
        weights = deployed(opened, target)
        config, spec = trtllm_config(weights, parallel, target.precision, kv_cache=target.kv_cache), opened.spec
        size = _bytes(opened, target)
        arguments = build_arguments(spec, target, parallel)
    ranks = [
        f"  rank {stage * parallel.tp + rank}: layers {stages.start}..{stages.stop - 1}, query heads "
        f"{_span(parallel.query_heads(rank, spec.num_heads))}, key heads {_span(parallel.key_heads(rank, spec.num_kv_heads))}"
        for stage in range(parallel.pp)
        for stages in [parallel.layers(stage, spec.num_layers)]
        for rank in range(parallel.tp)
    ]
    found = shutil.which(_PROGRAM)
    lines = [
        f"convert {checkpoint} to {folder / 'checkpoint'}: {config['dtype']}, quantisation {config['quantization']['quant_algo']}, "
        f"cache {'float8_e4m3' if target.kv_cache == 'fp8' else config['dtype']}, "
        f"{parallel.world} rank(s), about {size / 1e6:.0f} MB",
        *ranks,
        shlex.join([_PROGRAM, *_folders(folder), *arguments]),
        f"{_PROGRAM} is {found}: it would run"
        if found
        else f"{_PROGRAM} is not installed here: build.sh and BUILD.md would say how",
    ]
    return "\n".join(lines)


def instructions(target: Target, parallel: Parallel) -> str:
    """BUILD.md."""
    return f"""# Building this checkpoint with TensorRT-LLM {VERSION}

`checkpoint/` is in TensorRT-LLM's format, for {parallel.tp} x {parallel.pp} (tensor x pipeline parallel) cards of the target `{target.name}`.
In NVIDIA's TensorRT-LLM release container, version {VERSION}, on a machine with that card, with this folder and the ngpt-deploy sources
mounted:

    pip install --no-deps /path/to/ngpt-deploy
    ./build.sh                    # trtllm-build, writes engine/

`--no-deps` matters: this version of TensorRT-LLM pins transformers 4, which the model class does not need.

Serve `engine/` with TensorRT-LLM's Triton backend, whose C++ reads the engine's configuration itself and needs nothing of ngpt-deploy;
tokenizer files are beside this file. `trtllm-serve` and `tensorrt_llm.runtime.ModelRunnerCpp` read it in Python and look its
architecture up in a table: they find it after `import export.trtllm.model` in the same process.
`scripts/verify_on_vendor_container.sh` of ngpt-deploy does all of this and compares logits with PyTorch.

Not executed: this project has checked the network on a double of TensorRT-LLM's API, never on TensorRT-LLM.
"""


def _script(arguments: list[str]) -> str:
    return f"""#!/usr/bin/env bash
# Builds engine/ from checkpoint/ beside this script. Needs {_PROGRAM} {VERSION} and the Python package ngpt-deploy.
set -euo pipefail
here="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
model_file="$(python3 -c 'import pathlib, export.trtllm as e; print(pathlib.Path(e.__file__).with_name("model_file.py"))')"
exec {_PROGRAM} --checkpoint_dir "$here/checkpoint" --output_dir "$here/engine" --model_cls_file "$model_file" \\
    {shlex.join(arguments)} "$@"
"""


def _folders(folder: Path) -> list[str]:
    checkpoint, engine = folder / "checkpoint", folder / "engine"
    return ["--checkpoint_dir", str(checkpoint), "--output_dir", str(engine), "--model_cls_file", str(_MODEL_FILE)]


def _run(program: str, work: Path, arguments: list[str], parallel: Parallel) -> str:
    """Run trtllm-build, its output going to build.log; returns the version it writes. Raises BuildError."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))}
    log = work / "build.log"
    with log.open("wb") as file:
        done = subprocess.run(
            [program, *_folders(work), *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    missing = [f"rank{rank}.engine" for rank in range(parallel.world) if not (work / "engine" / f"rank{rank}.engine").is_file()]
    if done.returncode or missing:
        raise BuildError(
            f"{_PROGRAM} failed", expected=f"exit code 0 and {parallel.world} engine file(s)",
            found=f"exit code {done.returncode}, without {', '.join(missing) or 'none'}; its last lines: {tail.strip()}",
            remedy="see its messages; --dry-run prints the command",
        )  # fmt: skip
    config: dict[str, Any] = json.loads((work / "engine" / "config.json").read_text(encoding="utf-8"))
    return str(config["version"])


def _check(spec: NGPTSpec, target: Target, parallel: Parallel) -> None:
    """Raise UnsupportedError or TargetError before anything is written."""
    parallel.check(spec)
    rank = dataclasses.replace(
        spec,
        num_heads=spec.num_heads // parallel.tp,
        num_kv_heads=max(1, spec.num_kv_heads // parallel.tp),
        intermediate_size=spec.intermediate_size // parallel.tp,
        num_layers=math.ceil(spec.num_layers / parallel.pp),
    )
    check_fits(rank, target)


def _bytes(checkpoint: Checkpoint, target: Target) -> int:
    """Of the converted checkpoint: plain weights where TensorRT-LLM's loader quantises them."""
    weights = Weights(checkpoint)
    precision = target.precision if target.precision == "fp8" else ARITHMETIC[target.precision]
    return int(sum(math.prod(weights.shape(name)) for name in weights.names()) * BYTES_PER_WEIGHT[precision]) + (16 << 20)


def _kernels(target: Target) -> int | None:
    """The compute capability in tens and units for a target of form "plugins"."""
    return int(target.gpu.compute_capability.replace(".", "")) if target.form == "plugins" and target.gpu else None


def _span(heads: range) -> str:
    return str(heads.start) if len(heads) == 1 else f"{heads.start}..{heads.stop - 1}"
