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

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import export.trtllm
from engines.backends.protocol import Job, StoredRows, TapFunction, Written
from engines.memory import check_fits, total_bytes
from engines.runtime.manifest import Manifest
from engines.runtimes import RUNTIMES
from engines.target import Target
from export.precision import Precision
from export.trtllm.config import ARCHITECTURE, trtllm_config
from export.trtllm.convert import convert
from export.trtllm.parallel import Parallel
from ngpt.errors import BuildError
from ngpt.progress import Progress, part_of
from ngpt.spec import NGPTSpec

_SMALL_FILES = 16 << 20
VERSION = "1.2.1"
_PROGRAM = "trtllm-build"
_ROOT = Path(export.trtllm.__file__).parents[2]
_MODEL_FILE = Path(export.trtllm.__file__).with_name("model_file.py")


class TensorRTLLMBackend:
    """Engines of TensorRT-LLM's engine flow: always a checkpoint in its format, and an engine where `trtllm-build` is
    installed."""

    runtime = RUNTIMES["tensorrt_llm"]

    def tools(self) -> Mapping[str, str]:
        return {}  # the engine's own configuration says which version made it

    def check(self, spec: NGPTSpec, target: Target, parallel: Parallel) -> None:
        check_fits(spec, target, parallel)

    def estimate(self, spec: NGPTSpec, target: Target, parallel: Parallel) -> int:
        return converted_bytes(spec, target, parallel) * (3 if shutil.which(_PROGRAM) else 1)

    def write(self, job: Job, folder: Path, progress: Progress) -> Written:
        target, parallel = job.target, job.parallel
        (folder / "checkpoint").mkdir()
        convert(
            job.weights,
            folder / "checkpoint",
            parallel,
            target.precision,
            part_of(progress, 0.0, 0.7),
            kernels=_kernels(target),
            journal=job.journal,
        )
        arguments = build_arguments(job.spec, target, parallel)
        (folder / "build.sh").write_text(_script(arguments), encoding="utf-8")
        (folder / "build.sh").chmod(0o755)
        (folder / "BUILD.md").write_text(instructions(target, parallel), encoding="utf-8")
        program = shutil.which(_PROGRAM)
        if program is None:
            return Written(None)
        progress(f"{_PROGRAM} (minutes)", 0.7)
        version = _run(program, folder, arguments, parallel)
        flags = {"form": target.form, "tp": parallel.tp, "pp": parallel.pp, "trtllm_build": arguments}
        return Written("engine/rank0.engine", flags, {"tensorrt_llm": version})

    def taps(self, folder: Path, manifest: Manifest, precision: Precision, scratch: Path) -> TapFunction | None:
        return None  # the runtime shows logits alone

    def stored(self, folder: Path, manifest: Manifest) -> StoredRows | None:
        return None

    def outline(self, job: Job, folder: Path) -> list[str]:
        spec, target, parallel = job.spec, job.target, job.parallel
        config = trtllm_config(job.weights, parallel, target.precision)
        ranks = [
            f"  rank {stage * parallel.tp + rank}: layers {stages.start}..{stages.stop - 1}, query heads "
            f"{_span(parallel.query_heads(rank, spec.num_heads))}, key heads {_span(parallel.key_heads(rank, spec.num_kv_heads))}"
            for stage in range(parallel.pp)
            for stages in [parallel.layers(stage, spec.num_layers)]
            for rank in range(parallel.tp)
        ]
        found = shutil.which(_PROGRAM)
        return [
            f"convert {job.checkpoint.path} to {folder / 'checkpoint'}: {config['dtype']}, quantisation "
            f"{config['quantization']['quant_algo']}, cache {target.precision.cache}, {parallel.world} rank(s), about "
            f"{converted_bytes(spec, target, parallel) / 1e6:.0f} MB",
            *ranks,
            shlex.join([_PROGRAM, *_folders(folder), *build_arguments(spec, target, parallel)]),
            f"{_PROGRAM} is {found}: it would run"
            if found
            else f"{_PROGRAM} is not installed here: build.sh and BUILD.md would say how",
        ]


def converted_bytes(spec: NGPTSpec, target: Target, parallel: Parallel) -> int:
    """Of the converted checkpoint: plain weights where TensorRT-LLM's loader quantises them."""
    return total_bytes(spec, target.precision.written, parallel) + _SMALL_FILES


def build_arguments(spec: NGPTSpec, target: Target, parallel: Parallel) -> list[str]:
    """Options of trtllm-build, folders excepted.

    Packed tokens and a paged cache allow in-flight batching; paged context attention, chunked prefill. FP8 attention stays
    off: it wants a scale of the attention's output that only TensorRT-LLM's own attention module carries. So does paged
    context attention over an fp8 cache, which the builder gives up without fp8 weights and for which it turns FP8 attention
    on with them (builder.py, `build`): with that cache it is off, and a prompt is one step. There is no float32 fused attention.
    """
    assert target.profile is not None
    dtype = target.precision.arithmetic
    fused = "disable" if dtype == "float32" else "enable"
    paged = "disable" if target.precision.cache == "float8_e4m3" else fused
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


def instructions(target: Target, parallel: Parallel) -> str:
    """BUILD.md."""
    return f"""# Building this checkpoint with TensorRT-LLM {VERSION}

`checkpoint/` is in TensorRT-LLM's format, for {parallel.tp} x {parallel.pp} (tensor x pipeline parallel) cards of the target
`{target.name}`. In NVIDIA's TensorRT-LLM release container, version {VERSION}, on a machine with that card, with this folder and
the ngpt-deploy sources mounted:

    pip install --no-deps /path/to/ngpt-deploy
    ./build.sh                    # trtllm-build, writes engine/

`--no-deps` matters: this version of TensorRT-LLM pins transformers 4, which the model class does not need.

Serve `engine/` with TensorRT-LLM's Triton backend, whose C++ reads the engine's configuration itself and needs nothing of
ngpt-deploy;
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
            f"{_PROGRAM} failed",
            expected=f"exit code 0 and {parallel.world} engine file(s)",
            found=f"exit code {done.returncode}, without {', '.join(missing) or 'none'}; its last lines: {tail.strip()}",
            remedy="see its messages; --dry-run prints the command",
        )
    config: dict[str, Any] = json.loads((work / "engine" / "config.json").read_text(encoding="utf-8"))
    return str(config["version"])


def _kernels(target: Target) -> int | None:
    """The compute capability in tens and units for a target of form "plugins"."""
    return int(target.gpu.compute_capability.replace(".", "")) if target.form == "plugins" and target.gpu else None


def _span(heads: range) -> str:
    return str(heads.start) if len(heads) == 1 else f"{heads.start}..{heads.stop - 1}"
