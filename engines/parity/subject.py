"""What a verdict is about: the files of an engine and the checkpoint it was compared with, by their digests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.runtime.manifest import Manifest
from engines.runtime.verdict import description_digest, engine_files
from ngpt import __version__
from ngpt.checkpoint import Checkpoint
from ngpt.errors import EngineError


@dataclass(frozen=True)
class Subject:
    """``files``: name to SHA-256 of every file of the engine but the report's. ``description``: digest of what its manifest says
    of how to run them. ``checkpoint``: digests of the weights and of the spec."""

    files: Mapping[str, str]
    description: str
    checkpoint: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"files": dict(self.files), "description": self.description, "checkpoint": dict(self.checkpoint)}


def subject_of(manifest: Manifest) -> Subject:
    """The subject of a verdict on the engine of a manifest."""
    named = {name: manifest.digests[name] for name in ("weights", "spec") if name in manifest.digests}
    return Subject(engine_files(manifest), description_digest(manifest), named)


def check_checkpoint(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise EngineError unless the checkpoint is the one that the engine was built from, to the bit."""
    model = manifest.model
    # Tokens may have been given when the engine was built: they are the engine's, whatever the checkpoint says.
    spec = dataclasses.replace(
        checkpoint.spec,
        bos_token_id=model.bos_token_id,
        eos_token_ids=model.eos_token_ids,
        pad_token_id=model.pad_token_id,
    )
    found = {"weights": checkpoint.digest(), "spec": spec.digest()}
    if manifest.tools.get("ngpt-deploy") != __version__:
        del found["spec"]  # another version may have spelled a spec otherwise
    for name, digest in found.items():
        if manifest.digests.get(name) != digest:
            raise EngineError(
                f"the engine was not built from this checkpoint: its {name}",
                expected=manifest.digests.get(name, "a digest in the manifest"),
                found=digest,
                remedy=f"give the checkpoint that {manifest.name[:100]} was built from, as it was, or build the engine again",
            )
