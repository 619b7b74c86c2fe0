"""Signed verdicts: who reached one, told apart from whoever could write the folder. Keys are PEM files; no network is used.

What is signed is an in-toto Statement (v1) that a test had a result (predicate test-result v0.1) on the files of an engine, in
a DSSE envelope: the formats of https://github.com/in-toto/attestation, which cosign and other tools read as well.
securesystemslib makes and checks the signature (Ed25519, ECDSA, RSA or ML-DSA, as the key is).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engines.runtime.errors import EngineFileError
from engines.runtime.manifest import Manifest, contained_path, read_bounded
from engines.runtime.verdict import SIGNATURE_FILE, description_digest, engine_files
from ngpt.errors import BuildError, PackagingError, missing_package

PASSPHRASE = "NGPT_DEPLOY_KEY_PASSPHRASE"
"""The environment's variable that opens an encrypted key."""
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT, _PREDICATE = "https://in-toto.io/Statement/v1", "https://in-toto.io/attestation/test-result/v0.1"
_MAX_BYTES = 4 << 20  # of an envelope; a key is far smaller
_RESULTS = {"pass": "PASSED", "fail": "FAILED"}


def signing_with(key: Path) -> Callable[[Manifest, Mapping[str, str], str], str]:
    """A function that makes the line of `SIGNATURE_FILE`, a signed statement, of the manifest of an engine, of the report's
    SHA-256 by name, and of the verdict ("pass" or "fail"). The key is read now, the signature made when a verdict is there.

    Args:
        key: a private key in PEM; `PASSPHRASE` opens it where it is encrypted.

    Raises:
        BuildError: the key cannot be used. MissingPackageError: securesystemslib is not installed.
    """
    dsse, signer, serialization = _libraries()
    try:
        passphrase = os.environ.get(PASSPHRASE)
        secret = None if passphrase is None else passphrase.encode()
        made = signer.CryptoSigner(serialization.load_pem_private_key(read_bounded(key, _MAX_BYTES), secret))
    except Exception as error:  # the library has its own for keys of kinds that it does not know
        raise BuildError(
            f"the key {key} cannot sign",
            expected="a private key in PEM",
            found=str(error)[:300],
            remedy=f"make one with: openssl genpkey -algorithm ed25519 -out key.pem; an encrypted one is opened by {PASSPHRASE}",
        ) from error

    def sign(manifest: Manifest, report: Mapping[str, str], verdict: str) -> str:
        payload = json.dumps(_statement(manifest, report, verdict), sort_keys=True, separators=(",", ":")).encode()
        envelope = dsse.Envelope(payload, PAYLOAD_TYPE, {})
        envelope.sign(made)
        return json.dumps(envelope.to_dict(), sort_keys=True) + "\n"

    return sign


def check_signature(folder: Path, manifest: Manifest, key: Path) -> None:
    """Raise PackagingError unless the folder holds a statement that this engine passed, signed with the private half of `key`.

    The files themselves are `verify_files`' to check, and the verdict in the manifest `engines.runtime.verdict.standing`'s.
    """
    dsse, signer, serialization = _libraries()
    try:
        public = signer.SSlibKey.from_crypto(serialization.load_pem_public_key(read_bounded(key, _MAX_BYTES)))
    except Exception as error:  # the library has its own for keys of kinds that it does not know
        raise PackagingError(
            f"the public key {key} cannot be read",
            expected="a public key in PEM",
            found=str(error)[:300],
            remedy="openssl pkey -in key.pem -pubout -out key.pub writes that of a private one",
        ) from error
    try:
        raw = read_bounded(contained_path(folder, SIGNATURE_FILE), _MAX_BYTES)
    except EngineFileError as error:
        raise _refused("is not signed", f"{SIGNATURE_FILE} in its folder", error.found or str(error)) from error
    try:
        envelope = dsse.Envelope.from_dict(json.loads(raw))
        envelope.verify([public], 1)
        statement = json.loads(envelope.payload)
    except Exception as error:  # whatever a malformed envelope ends in: it is no signature
        raise _refused("is not signed with this key", str(key), f"{type(error).__name__}: {error}"[:300]) from error
    report = {name: entry.sha256 for name, entry in manifest.files.items() if name == "parity.json"}
    if envelope.payload_type != PAYLOAD_TYPE or statement != _statement(manifest, report, "pass"):
        raise _refused("has a signature of something else", "a pass of these files", _said(statement))


def _statement(manifest: Manifest, report: Mapping[str, str], verdict: str) -> dict[str, Any]:
    files = {**engine_files(manifest), **report}
    digests = {"description": description_digest(manifest), **manifest.digests}
    return {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": _PREDICATE,
        "predicate": {
            "result": _RESULTS[verdict],
            "configuration": [
                {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}} for name, digest in sorted(digests.items())
            ],
            ("passedTests" if verdict == "pass" else "failedTests"): ["parity"],
        },
    }


def _said(statement: Any) -> str:
    predicate = statement.get("predicate") if isinstance(statement, dict) else None
    result = predicate.get("result") if isinstance(predicate, dict) else None
    return f"{result!r:.40} of other files" if result == "PASSED" else f"the result {result!r:.40}"


def _refused(what: str, expected: str, found: str) -> PackagingError:
    return PackagingError(
        f"the engine {what}",
        expected=expected,
        found=found,
        remedy="ngpt-deploy verify ENGINE --checkpoint DIR --sign KEY, by whoever is trusted to",
    )


def _libraries() -> tuple[Any, Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from securesystemslib import dsse, signer
    except ImportError as error:
        raise missing_package("signatures need securesystemslib", "sign", found=str(error)) from error
    return dsse, signer, serialization
