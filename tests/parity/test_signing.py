"""Signed verdicts: what the holder of a key said of an engine, told apart from what anybody wrote into its folder."""

import base64
import json
import shutil
import subprocess

import pytest

from engines import build_engine
from engines.runtime.manifest import describe_file, read_manifest
from engines.runtime.verdict import SIGNATURE_FILE
from engines.signing import PASSPHRASE, check_signature
from ngpt.errors import PackagingError
from scripts.cli import main
from tests.ngpt.making import GOLDEN
from triton_repo import package_engine

GQA = GOLDEN / "gqa"
KINDS = {
    "ed25519": ["-algorithm", "ed25519"],
    "ecdsa": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "rsa": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
}


def make_key(folder, name, kind="ed25519", *options):
    """The keys as docs/SECURITY.md has them made."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    subprocess.run(["openssl", "genpkey", *KINDS[kind], *options, "-out", private], check=True, capture_output=True)
    secret = ["-passin", "pass:secret"] if options else []
    subprocess.run(["openssl", "pkey", "-in", private, *secret, "-pubout", "-out", public], check=True, capture_output=True)
    return private, public


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed")
    private, public = make_key(folder, "key")
    engine = build_engine(GQA, "cpu-fp32", folder / "engine", verify=False)
    verify = ["verify", str(engine), "--checkpoint", str(GQA), "--decode-steps", "2"]
    assert main([*verify, "--sign", str(private)]) == 0
    return folder, engine, public


@pytest.fixture
def engine(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "engine")


def test_the_holder_of_the_key_vouches_for_the_engine(made, tmp_path):
    folder, engine, public = made
    package_engine(engine, tmp_path / "models", require_signature=public)
    assert main(["inspect", str(engine), "--require-signature", str(public)]) == 0
    _, other = make_key(folder, "other")
    with pytest.raises(PackagingError, match="not signed with this key"):
        package_engine(engine, tmp_path / "refused", require_signature=other)
    assert main(["inspect", str(engine), "--require-signature", str(other)]) == 2
    assert not (tmp_path / "refused").exists()


def test_the_envelope_is_an_in_toto_statement_that_other_tools_read(made):
    envelope = json.loads((made[1] / SIGNATURE_FILE).read_text())
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    statement = json.loads(base64.b64decode(envelope["payload"]))
    assert statement["predicate"]["result"] == "PASSED" and statement["_type"].endswith("/Statement/v1")
    named = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    manifest = read_manifest(made[1])
    assert named == {n: e.sha256 for n, e in manifest.files.items() if n not in ("parity.html", SIGNATURE_FILE)}


def test_openssl_agrees_that_the_key_made_the_signature(made, tmp_path):
    """The signature is over DSSE's encoding of the payload: checked here by another implementation."""
    folder, engine, public = made
    envelope = json.loads((engine / SIGNATURE_FILE).read_text())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
    (tmp_path / "message").write_bytes(b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload))
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    check = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", tmp_path / "message"]
    run = subprocess.run([*check, "-sigfile", tmp_path / "signature"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def forge(engine, text):
    (engine / SIGNATURE_FILE).write_text(text)
    manifest = json.loads((engine / "manifest.json").read_text())
    entry = describe_file(engine / SIGNATURE_FILE)
    manifest["files"][SIGNATURE_FILE] = {"bytes": entry.bytes, "sha256": entry.sha256}
    (engine / "manifest.json").write_text(json.dumps(manifest))


def altered(line, **changes):
    envelope = json.loads(line)
    statement = json.loads(base64.b64decode(envelope["payload"]))
    envelope["payload"] = base64.b64encode(json.dumps({**statement, **changes}).encode()).decode()
    return json.dumps(envelope)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: altered(line, subject=[]),
        lambda line: "{}",
        lambda line: "[" * 100_000,
        lambda line: json.dumps({**json.loads(line), "signatures": []}),
        lambda line: json.dumps({**json.loads(line), "payload": "AAAA"}),
        lambda line: json.dumps({**json.loads(line), "payloadType": "text/plain"}),
        lambda line: "",
    ],
)
def test_an_envelope_that_was_changed_is_no_signature(engine, made, change):
    line = (engine / SIGNATURE_FILE).read_text()
    forge(engine, change(line))
    with pytest.raises(PackagingError, match="not signed with this key"):
        check_signature(engine, read_manifest(engine), made[2])


def test_the_signature_of_another_engine_or_of_a_failure_does_not_do(engine, made, tmp_path):
    line = (engine / SIGNATURE_FILE).read_text()
    manifest = json.loads((engine / "manifest.json").read_text())
    raw = bytearray((engine / "model.onnx").read_bytes())
    raw[-1] ^= 1
    (engine / "model.onnx").write_bytes(raw)
    entry = describe_file(engine / "model.onnx")
    manifest["files"]["model.onnx"] = {"bytes": entry.bytes, "sha256": entry.sha256}
    manifest["parity"]["subject"]["files"]["model.onnx"] = entry.sha256
    (engine / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PackagingError, match="signature of something else.*PASSED.*of other files"):
        check_signature(engine, read_manifest(engine), made[2])
    failed = shutil.copytree(made[1], tmp_path / "failed")
    from engines.signing import signing_with

    read = read_manifest(failed)
    report = {"parity.json": read.files["parity.json"].sha256}
    forge(failed, signing_with(made[0] / "key.pem")(read, report, "fail"))
    with pytest.raises(PackagingError, match="signature of something else.*FAILED"):
        check_signature(failed, read_manifest(failed), made[2])
    assert line


def test_an_unsigned_engine_is_refused_and_a_new_verdict_takes_the_signature_away(engine, made, tmp_path):
    assert main(["verify", str(engine), "--checkpoint", str(GQA), "--decode-steps", "2"]) == 0
    assert not (engine / SIGNATURE_FILE).exists()
    with pytest.raises(PackagingError, match="is not signed: expected parity.intoto.jsonl"):
        package_engine(engine, tmp_path / "models", require_signature=made[2])


def test_a_signature_comes_along_with_the_report_of_another_machine(engine, made, tmp_path):
    bare = build_engine(GQA, "cpu-fp32", tmp_path / "bare", verify=False)
    shutil.copyfile(engine / "model.onnx", bare / "model.onnx")
    assert main(["verify", str(bare), "--adopt", str(engine / "parity.json")]) == 0
    check_signature(bare, read_manifest(bare), made[2])


@pytest.mark.parametrize("kind", [*KINDS, "encrypted"])
def test_keys_of_every_usual_kind_sign(engine, tmp_path, monkeypatch, kind):
    encrypted = kind == "encrypted"
    options = ["-aes256", "-pass", "pass:secret"] if encrypted else []
    private, public = make_key(tmp_path, "key", "ed25519" if encrypted else kind, *options)
    verify = ["verify", str(engine), "--adopt", str(engine / "parity.json"), "--sign", str(private)]
    if encrypted:
        assert main(verify) == 2
        monkeypatch.setenv(PASSPHRASE, "secret")
    assert main(verify) == 0
    check_signature(engine, read_manifest(engine), public)


def test_a_file_that_is_no_key_is_named(engine, tmp_path, capsys):
    (tmp_path / "no.pem").write_text("nothing")
    adopt = ["verify", str(engine), "--adopt", str(engine / "parity.json")]
    assert main([*adopt, "--sign", str(tmp_path / "no.pem")]) == 2
    assert "cannot sign: expected a private key in PEM" in capsys.readouterr().err
    assert main(["inspect", str(engine), "--require-signature", str(tmp_path / "no.pem")]) == 2
    assert "public key" in capsys.readouterr().err
