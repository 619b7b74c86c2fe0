"""What is looked at for what was asked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.device import detect
from engines.runtimes import RUNTIMES
from engines.target import Target
from scripts.doctoring import cards, machine, packages
from scripts.doctoring.findings import Finding, guarded, isolated, size

_SIZES = "import json, sys; from scripts.doctoring.sizes import sizes; print(json.dumps(sizes(*json.loads(sys.argv[1]))))"
_EXTRAS = {"onnxruntime": "onnx", "tensorrt": "tensorrt", "tensorrt_rtx": "rtx", "tensorrt_llm": "tensorrt-llm"}
_CUDA = "CUDAExecutionProvider"
_MORE = ("openai", "guided", "sign", "genai", "openvino")
"""Extras that nothing asks for here, and that are looked up all the same."""


@dataclass(frozen=True)
class Asked:
    """What shall be done. target: to build and verify for; None for nothing in particular. serve: with Triton, here."""

    target: Target | None = None
    target_name: str = ""
    checkpoint: str | None = None
    precision: str | None = None
    kv_cache: str = "auto"
    tp: int = 1
    pp: int = 1
    output: Path = Path()
    serve: bool = False
    imports: bool = True

    @property
    def words(self) -> str:
        """For the last line."""
        parts = [f"build for {self.target.name}"] if self.target else []
        parts += ["serve"] if self.serve else []
        return " and ".join(parts) or "run inspect, plan and package"


Probe = tuple[str, Callable[[], list[Finding]]]


def examine(asked: Asked) -> Iterator[Probe]:
    """(what is looked at, what looks), one after the other; nothing that looks raises."""
    target, sizes = asked.target, Sizes(asked)
    yield from _one(machine.GROUP, "Python", machine.python)
    yield from _one(machine.GROUP, "processor", machine.processor)
    yield "checkpoint", lambda: sizes.findings
    yield from _one(machine.GROUP, "memory", lambda: machine.enough_memory(*sizes.of("memory")))
    yield from _one(machine.GROUP, "disk", lambda: machine.disk(asked.output, *sizes.of("disk")))
    yield from _one(machine.GROUP, "file system", lambda: machine.file_system(asked.output))
    yield "packages", lambda: packages.of_extra("", needed=True, imports=asked.imports)
    yield "packages that build", lambda: packages.of_extra("torch", needed=target is not None, imports=asked.imports)
    yield from _runtimes(asked)
    yield from _card(asked, sizes)
    if asked.serve or target is None:
        yield "the server", lambda: packages.of_extra("serve", needed=asked.serve, imports=asked.imports)
        yield (
            "what else there is",
            lambda: [
                finding
                for extra in _MORE
                for finding in packages.of_extra(extra, needed=False, imports=False, but=("tritonclient", "protobuf"))
            ],
        )
        remedy = "pip install 'nvidia-pytriton==0.7.*'  (extra serve), or NVIDIA's Triton container"
        yield from _one(machine.GROUP, "shared memory", machine.shared_memory)
        yield from _one(machine.GROUP, "ports", machine.ports)
        yield from _one("server", "tritonserver", lambda: _server(remedy, asked.serve))


class Sizes:
    """What the build takes, asked once."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._answer: Any = None

    @property
    def findings(self) -> list[Finding]:
        """Of the checkpoint."""
        asked = self._asked
        if asked.target is None:
            return []
        given = (asked.checkpoint, asked.target_name, asked.precision, asked.kv_cache, asked.tp, asked.pp)
        if asked.checkpoint is not None:
            answer = isolated(_SIZES, json.dumps(given), limit=120.0)
            self._answer = answer.value
            if answer.trouble:
                remedy = "correct --checkpoint, --target, --tp or --pp"
                found = re.sub(r"^[\w.]+Error: ", "", answer.trouble)
                return [Finding("build", "checkpoint", "unfit", found, "one that can be built", remedy, needed=True)]
            found = f"{asked.checkpoint}: an engine of {size(self._answer['engine'])}"
            return [Finding("build", "checkpoint", "good", found, needed=True)]
        return []

    def of(self, what: str) -> tuple[int | None, str]:
        """Bytes and why; (None, "") where nobody knows."""
        if self._answer is None or self._answer.get(what) is None:
            return None, ""
        return self._answer[what], self._answer[f"{what}_why"]


def _one(group: str, name: str, probe: Callable[[], Finding]) -> Iterator[Probe]:
    yield name, lambda: [guarded(group, name, probe)]


def _runtimes(asked: Asked) -> Iterator[Probe]:
    """The packages of the target's runtime, or of all."""
    target, imports = asked.target, asked.imports
    for name in [target.runtime] if target is not None else RUNTIMES:
        extra = _EXTRAS.get(name)
        if extra is None:  # of a runtime from outside
            continue
        if target is not None and name == "onnxruntime":
            gpu = _CUDA in target.providers
            chosen = "onnx-gpu" if gpu else extra
            provider = _CUDA if gpu else "CPUExecutionProvider"
            yield name, lambda chosen=chosen, provider=provider: packages.runtime(chosen, provider, imports=imports)  # type: ignore[misc]
            continue
        # A TensorRT-LLM target is converted without its library, which is wanted where trtllm-build shall run.
        needed = target is not None and name != "tensorrt_llm"
        yield name, lambda extra=extra, needed=needed: packages.of_extra(extra, needed=needed, imports=imports)  # type: ignore[misc]


def _card(asked: Asked, sizes: Sizes) -> Iterator[Probe]:
    target = asked.target
    on_gpu = target is not None and (target.gpu is not None or _CUDA in target.providers)
    if target is not None and not on_gpu:
        return
    builds_on_card = target is not None and target.runtime == "tensorrt"  # which looks at the card that it builds for
    yield from _one(cards.GROUP, "driver", lambda: cards.driver(needed=builds_on_card))
    yield from _one(cards.GROUP, "GPU", lambda: cards.card(target, needed=builds_on_card))
    needed, why = sizes.of("card")
    if needed is not None:
        size, reason = needed, why
        yield from _one(cards.GROUP, "GPU memory", lambda: cards.card_memory(size, reason, detect()))
    plugins = target is not None and target.form == "plugins"
    if plugins or target is None:
        yield from _one(cards.GROUP, "compiler of kernels", lambda: cards.compiler(needed=plugins))
    if target is None or target.runtime == "tensorrt_llm":
        remedy = "run the build in NVIDIA's TensorRT-LLM release container, or build.sh there afterwards"
        makes = "makes an engine of a converted checkpoint"
        yield from _one(cards.GROUP, "trtllm-build", lambda: cards.program("trtllm-build", makes, remedy, needed=False))


def _server(remedy: str, needed: bool) -> Finding:
    """The binary of the pip server, or one on PATH."""
    from triton_repo.server import triton_home

    path = shutil.which("tritonserver")
    try:
        binary = triton_home() / "bin" / "tritonserver"
    except ImportError:
        binary = None
    if binary is not None and binary.is_file():
        return Finding("server", "tritonserver", "good", str(binary), needed=needed)
    if path is not None:
        found = f"{path}, which `serve` does not use: start it with --model-repository"
        return Finding("server", "tritonserver", "unfit", found, "the pip server", remedy, needed)
    return Finding("server", "tritonserver", "missing", "not installed", "the pip server", remedy, needed)
