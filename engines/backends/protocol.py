"""What the builder asks of a runtime, and nothing else: the same five steps make every engine (`engines.build`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.runtime.manifest import Manifest
from engines.runtimes import Runtime
from engines.target import Target
from export.journal import Journal
from export.precision import Precision
from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt.checkpoint import Checkpoint
from ngpt.progress import Progress
from ngpt.spec import NGPTSpec
from ngpt.weights import Weights

TapFunction = Callable[[NDArray[np.int64]], dict[str, NDArray[np.float32]]]
"""Token ids [T] -> values inside the engine by tap name (`engines.parity.taps`), float32 [T, n]."""


StoredRows = Callable[[str, int, int], NDArray[np.float32] | None]
"""(PyTorch name of a module, first row, count) -> the rows that the engine multiplies by, [count, in]; None where its matrix is
not quantised."""


@dataclass(frozen=True)
class Job:
    """One build: the checkpoint, read and checked, what it is built for, among how many GPUs it is divided, and what of it an
    earlier process has completed (None: what is killed begins anew)."""

    checkpoint: Checkpoint
    target: Target
    parallel: Parallel
    journal: Journal | None = None

    @property
    def spec(self) -> NGPTSpec:
        """The model's sizes."""
        return self.checkpoint.spec

    @property
    def weights(self) -> DeployedWeights:
        """The checkpoint's weights as a lowering takes them."""
        return deployed(self.checkpoint, self.target.precision)


def deployed(checkpoint: Checkpoint, precision: Precision) -> DeployedWeights:
    """A checkpoint's weights for the arithmetic of a precision."""
    return DeployedWeights(Weights(checkpoint), arithmetic=precision.arithmetic)


@dataclass(frozen=True)
class Written:
    """What a backend left in the engine's folder.

    graph: the file that the runtime loads, relative to the folder; None where only the ingredients of an engine were
    written, which a tool that is not here makes into one. flags: what the manifest says beside the target's own fields.
    tools: versions, by name, of what made it, where they are known only now. cache: how keys and values are kept, where that
    is not as the target says.
    """

    graph: str | None
    flags: Mapping[str, Any] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    cache: str | None = None


class Backend(Protocol):
    """A runtime's door. `register` adds one from outside."""

    @property
    def runtime(self) -> Runtime:
        """What targets may say of it."""

    def tools(self) -> Mapping[str, str]:
        """Versions of the packages that write its engines, by name. Raises MissingPackageError where one is not installed."""

    def check(self, spec: NGPTSpec, target: Target, parallel: Parallel) -> None:
        """Raise TargetError or UnsupportedError where the target cannot hold this model: before weights are read or anything
        is written."""

    def estimate(self, spec: NGPTSpec, target: Target, parallel: Parallel) -> int:
        """Bytes of disk that `write` takes at most."""

    def write(self, job: Job, folder: Path, progress: Progress) -> Written:
        """Write the engine into an existing folder. Raises BuildError with the runtime's own reason."""

    def taps(self, folder: Path, manifest: Manifest, precision: Precision, scratch: Path) -> TapFunction | None:
        """Values inside the engine in `folder`, from its own graph, for the check layer by layer; None where a runtime shows
        none. `scratch` is a folder for files, on the same disk if possible."""

    def stored(self, folder: Path, manifest: Manifest) -> StoredRows | None:
        """The quantised matrices that lie in the engine's own files; None where a runtime keeps them to itself."""

    def outline(self, job: Job, folder: Path) -> list[str]:
        """What `write` would do, in lines, for a dry run."""
