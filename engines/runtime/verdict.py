"""A verdict in a manifest, held against what it was reached on. Whoever packages, inspects or loads an engine compares.

A verdict belongs to files: `parity["subject"]` names the digests of every file of the engine, of what the manifest says of how
to run them, and of the checkpoint; `parity["report_sha256"]` that of the report, whose own verdict and subject must be the
same. That catches what got mixed up or edited by hand, not somebody who writes the whole folder anew: see docs/SECURITY.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import EngineFileError
from .manifest import Manifest, contained_path, read_bounded

SIGNATURE_FILE = "parity.intoto.jsonl"
REPORT_FILES = ("parity.json", "parity.html", SIGNATURE_FILE)
MAX_REPORT_BYTES = 64 << 20
_TOKENS = ("bos_token_id", "eos_token_ids", "pad_token_id")


def engine_files(manifest: Manifest) -> dict[str, str]:
    """Name to SHA-256 of every file that is not the report's."""
    return {name: entry.sha256 for name, entry in sorted(manifest.files.items()) if name not in REPORT_FILES}


def description_digest(manifest: Manifest) -> str:
    """SHA-256 of what a manifest says of how the engine is run. Not of names, dates, notes and the tokens that end a text: they
    change nothing of what was compared, and the tokens may be chosen when the engine is packaged."""
    data = manifest.to_dict()
    target = {key: data["target"][key] for key in ("runtime", "providers", "precision", "cache")}
    model = {key: value for key, value in data["model"].items() if key not in _TOKENS}
    kept = {key: data[key] for key in ("graph", "digests", "flags", "precision")}
    text = json.dumps({**kept, "target": target, "model": model}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def standing(folder: Path, manifest: Manifest) -> str:
    """What the verdict is worth: "pass" or "fail" where it is bound to these files, "missing" where there is none, "unbound"
    where it does not say what it was reached on, as those of versions before 0.4.

    Raises EngineFileError where the verdict contradicts its report or was reached on other files. Reads the report, whose digest
    is among the manifest's files; `verify_files` compares it.
    """
    parity = manifest.parity
    if parity is None:
        return "missing"
    if parity["verdict"] != "pass":
        return "fail"  # which nobody has to prove
    subject = parity.get("subject")
    if not isinstance(subject, Mapping):
        return "unbound"
    check_subject(subject, manifest)
    name = parity.get("report")
    entry = manifest.files.get(name) if isinstance(name, str) else None
    if entry is None or parity.get("report_sha256") != entry.sha256:
        found = entry.sha256 if entry else "none"
        raise _contradicts("the report that the verdict names", f"{parity.get('report_sha256')!s:.100}", found)
    report = read_report(contained_path(folder, str(name)), entry.sha256)
    for key, said in (("verdict", parity["verdict"]), ("subject", subject)):
        if report.get(key) != said:
            raise _contradicts(f"the {key} in the manifest and in its report", f"{report.get(key)!s:.200}", f"{said!s:.200}")
    return str(parity["verdict"])


def check_subject(subject: Mapping[str, Any], manifest: Manifest) -> None:
    """Raises EngineFileError unless a subject is the manifest's engine: the same files, run alike, of the same checkpoint."""
    files = subject.get("files")
    if not isinstance(files, Mapping):
        raise _contradicts("the files of the verdict", "a table of names and digests", f"{files!r:.100}")
    own = engine_files(manifest)
    for name in sorted({*own, *files}, key=str):
        if own.get(name) != files.get(name):
            what = f"it was reached on another {name!s:.100}"
            raise _contradicts(what, f"{files.get(name)!s:.100}", str(own.get(name)))
    if subject.get("description") != description_digest(manifest):
        raise _contradicts(
            "how the engine is run, as its manifest says", f"{subject.get('description')!s:.100}", description_digest(manifest)
        )
    checkpoint = subject.get("checkpoint")
    for name in ("weights", "spec"):
        said = checkpoint.get(name) if isinstance(checkpoint, Mapping) else None
        if said != manifest.digests.get(name):
            raise _contradicts(f"the checkpoint's {name}", f"{said!s:.100}", str(manifest.digests.get(name)))


def read_report(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """A report's JSON, of at most `MAX_REPORT_BYTES`; with `sha256`, whose digest must be that. Raises EngineFileError."""
    raw = read_bounded(path, MAX_REPORT_BYTES)
    found = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and found != sha256:
        raise _contradicts(f"{path.name}", f"SHA-256 {sha256}", found)
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise EngineFileError(f"{path}", expected="a parity report in JSON", found=str(error)[:200]) from error
    if not isinstance(data, dict) or data.get("verdict") not in ("pass", "fail"):
        raise EngineFileError(f"{path}", expected="a parity report with a verdict", found="something else")
    return data


def _contradicts(what: str, expected: str, found: str) -> EngineFileError:
    return EngineFileError(
        f"the parity verdict does not hold: {what}",
        expected=expected,
        found=found,
        remedy="Verify the engine again: ngpt-deploy verify ENGINE --checkpoint DIR. Do not edit the manifest by hand.",
    )
