"""Every reader of files from outside: a good file, how it is spoiled, and what reads it as the commands do."""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from scripts.hostility import formats, mutations

ROOT = Path(__file__).resolve().parents[2]
GOLDEN, TINY = ROOT / "tests" / "golden", ROOT / "examples" / "ngpt-tiny"
SIGNS = importlib.util.find_spec("securesystemslib") is not None and importlib.util.find_spec("cryptography") is not None
MISPLACED = 0.04
"""Part of the cases in which something else stands in the file's place."""


@dataclass(frozen=True)
class Goods:
    """Good files, made once. engine: of golden gqa for cpu-fp32, verified; text: a small tokenizer's files; store: with one
    entry; signature: of the engine's verdict, and the public key, where the extra `sign` is installed."""

    folder: Path

    @property
    def engine(self) -> Path:
        return self.folder / "engine"

    @property
    def text(self) -> Path:
        return self.folder / "text"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def signature(self) -> Path:
        return self.folder / "signature.jsonl"

    @property
    def key(self) -> Path:
        return self.folder / "public.pem"

    @classmethod
    def make(cls, folder: Path) -> Goods:
        """In an empty folder; takes some seconds."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        from engines.build import build_engine
        from engines.parity.verify import verify
        from engines.record import record_verdict

        goods = cls(folder)
        build_engine(GOLDEN / "gqa", "cpu-fp32", goods.engine, verify=False)
        record_verdict(goods.engine, verify(goods.engine, GOLDEN / "gqa", decode_steps=1))
        build_engine(GOLDEN / "gqa", "cpu-fp32", store=goods.store, verify=False)
        if SIGNS:
            goods._sign()
        goods.text.mkdir()
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:200]
        made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(letters)}, []))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
        made.save(str(goods.text / "tokenizer.json"))
        token = {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name, content in (
            ("tokenizer_config.json", {"eos_token": token, "added_tokens_decoder": {"200": token}, "model_max_length": 512}),
            ("special_tokens_map.json", {"eos_token": "<|endoftext|>"}),
            ("added_tokens.json", {"<|endoftext|>": 200}),
            ("generation_config.json", {"eos_token_id": [2, 200], "temperature": 0.7, "top_p": 0.9, "do_sample": True}),
        ):
            (goods.text / name).write_text(json.dumps(content))
        template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
        (goods.text / "chat_template.jinja").write_text(template)
        return goods

    def _sign(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

        from engines.runtime.manifest import read_manifest
        from engines.signing import signing_with

        made, private, manifest = Ed25519PrivateKey.generate(), self.folder / "private.pem", read_manifest(self.engine)
        private.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.key.write_bytes(made.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        report = {"parity.json": manifest.files["parity.json"].sha256}
        self.signature.write_text(signing_with(private)(manifest, report, "pass"))


@dataclass(frozen=True)
class Reader:
    """share: of all cases. write: a spoiled file into an empty folder. read: it; may raise."""

    share: float
    write: Callable[[Goods, Path, random.Random], None]
    read: Callable[[Goods, Path], None]


def _put(path: Path, data: bytes, pick: random.Random) -> None:
    path.write_bytes(data)
    if pick.random() < MISPLACED:
        mutations.misplace(path, pick)


def _hf_case(pick: random.Random) -> Path:
    return GOLDEN / pick.choice(("gqa", "llama3-rope-bias", "dead-mlp"))


def _checkpoint(folder: Path) -> None:
    from ngpt.checkpoint import open_checkpoint

    with open_checkpoint(folder) as opened:
        opened.validate()


def _write_config(goods: Goods, folder: Path, pick: random.Random) -> None:
    from ngpt.config_keys import DEFAULTS

    case = _hf_case(pick)
    os.link(case / "model.safetensors", folder / "model.safetensors")
    tree = json.loads((case / "config.json").read_text())
    _put(folder / "config.json", mutations.spoil_json(tree, pick, tuple(DEFAULTS)), pick)


def _read_config(goods: Goods, folder: Path) -> None:
    from engines.capacity import read_spec

    read_spec(folder)
    _checkpoint(folder)


def _write_safetensors(goods: Goods, folder: Path, pick: random.Random) -> None:
    case = _hf_case(pick)
    shutil.copyfile(case / "config.json", folder / "config.json")
    _put(folder / "model.safetensors", formats.spoil_safetensors((case / "model.safetensors").read_bytes(), pick), pick)


def _write_index(goods: Goods, folder: Path, pick: random.Random) -> None:
    case = GOLDEN / "gqa"
    shutil.copyfile(case / "config.json", folder / "config.json")
    data = (case / "model.safetensors").read_bytes()
    names = [name for name in json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]) if name != "__metadata__"]
    whole = "model-00001-of-00001.safetensors"
    os.link(case / "model.safetensors", folder / whole)
    tree = {"metadata": {"total_size": len(data)}, "weight_map": dict.fromkeys(names, whole)}
    if pick.random() < 0.3:
        tree["weight_map"][pick.choice(names)] = pick.choice(mutations.PATHS)  # type: ignore[index]
    _put(folder / "model.safetensors.index.json", mutations.spoil_json(tree, pick, ("weight_map", "metadata", *names[:3])), pick)


def _write_research(goods: Goods, folder: Path, pick: random.Random) -> None:
    data = (GOLDEN / "research-checkpoint" / "ckpt.pt").read_bytes()
    _put(folder / "ckpt.pt", formats.spoil_archive(data, pick), pick)


def _read_research(goods: Goods, folder: Path) -> None:
    _checkpoint(folder / "ckpt.pt")


def _write_text(goods: Goods, folder: Path, pick: random.Random) -> None:
    for file in goods.text.iterdir():
        shutil.copyfile(file, folder / file.name)
    for name in ("config.json", "model.safetensors"):
        os.link(GOLDEN / "gqa" / name, folder / name)
    file = pick.choice(sorted(goods.text.iterdir()))
    data = file.read_bytes()
    if file.suffix == ".json" and pick.random() < 0.85:
        data = mutations.spoil_json(
            json.loads(data), pick, ("eos_token", "eos_token_id", "model", "added_tokens", "type", "vocab")
        )
    else:
        data = mutations.spoil_bytes(data, pick)
    _put(folder / file.name, data, pick)


def _read_text(goods: Goods, folder: Path) -> None:
    """As build reads it, as serving does, and as chat does; each by itself, so that what one refuses is given to the others."""
    from engines.runtime.text import Tokenizer
    from triton_repo.openai.chat_template import ChatTemplate

    refused: Exception | None = None
    readers: list[Callable[[Path], Any]] = [
        _text_of_checkpoint,
        lambda path: Tokenizer.load(path).encode("text"),
        ChatTemplate.load,
    ]
    for read in readers:
        try:
            read(folder)
        except Exception as error:
            if not typed(error):
                raise
            refused = refused or error
    if refused is not None:
        raise refused


def _text_of_checkpoint(folder: Path) -> None:
    from ngpt.checkpoint import open_checkpoint

    with open_checkpoint(folder) as opened:
        opened.text.check(opened.spec.vocab_size)
        target = folder / "copied"
        target.mkdir()
        opened.text.copy_to(target)


def _link_engine(goods: Goods, folder: Path, but: str) -> None:
    for file in goods.engine.iterdir():
        if file.name != but:
            os.link(file, folder / file.name)


def _write_manifest(goods: Goods, folder: Path, pick: random.Random) -> None:
    _link_engine(goods, folder, "manifest.json")
    tree = json.loads((goods.engine / "manifest.json").read_text())
    names = ("note", "flags", "parity", "precision", "generation", "compute_capability", "subject", "block_size")
    data = mutations.spoil_json(tree, pick, names)
    _put(folder / "manifest.json", mutations.spoil_bytes(data, pick) if pick.random() < 0.1 else data, pick)


def _read_manifest(goods: Goods, folder: Path) -> None:
    """As inspect reads it, and what else verify and package want to know."""
    from engines.record import recorded_precision
    from engines.runtime.compatibility import slots_for
    from engines.runtime.manifest import read_manifest

    arguments = _commands().parse_args(["inspect", str(folder), "--quick", "--on", "h100"])
    arguments.run(arguments)
    manifest = read_manifest(folder)
    json.dumps(manifest.to_dict())
    slots_for(manifest, 8)
    recorded_precision(manifest)


@lru_cache(maxsize=1)
def _commands() -> argparse.ArgumentParser:
    from scripts.cli import parser

    return parser()


def _write_report(goods: Goods, folder: Path, pick: random.Random) -> None:
    tree = json.loads((goods.engine / "parity.json").read_text())
    if pick.random() < 0.7:  # the curves are most of the text, and all alike
        tree["sequences"] = tree["sequences"][:1]
    _put(folder / "parity.json", mutations.spoil_json(tree, pick, ("verdict", "subject", "checks", "summary", "files")), pick)


def _read_report(goods: Goods, folder: Path) -> None:
    """As `verify --adopt`, up to what would be recorded."""
    from scripts.commands.verifying import _adopted

    report = _adopted(folder / "parity.json", goods.engine)
    report.write(folder / "written")


def _write_target(goods: Goods, folder: Path, pick: random.Random) -> None:
    file = pick.choice(sorted((ROOT / "engines" / "targets").glob("*.toml")))
    _put(folder / "mine.toml", mutations.spoil_toml(file.read_text(), pick), pick)


def _read_target(goods: Goods, folder: Path) -> None:
    """As plan reads it."""
    from engines.capacity import plan_capacity, read_spec
    from engines.target import load_target, with_kv_cache

    target = load_target(folder / "mine.toml")
    if target.gpu is not None:
        with_kv_cache(target, "auto")
        plan_capacity(read_spec(None), target, 1, 1024, None, 1).table()


def _write_graph(goods: Goods, folder: Path, pick: random.Random) -> None:
    from engines.runtime.manifest import describe_file

    _link_engine(goods, folder, "manifest.json")
    (folder / "model.onnx").unlink()
    data = formats.spoil_graph((goods.engine / "model.onnx").read_bytes(), pick)
    (folder / "model.onnx").write_bytes(data)
    tree = json.loads((goods.engine / "manifest.json").read_text())
    entry = describe_file(folder / "model.onnx")
    tree["files"]["model.onnx"], tree["parity"] = {"bytes": entry.bytes, "sha256": entry.sha256}, None
    (folder / "manifest.json").write_text(json.dumps(tree))


def _read_graph(goods: Goods, folder: Path) -> None:
    """As inspect does, and then as generate."""
    from engines import load_engine
    from engines.runtime.manifest import read_manifest, verify_files

    verify_files(folder, read_manifest(folder))
    with load_engine(folder, num_slots=1, threads=1) as engine:
        engine.generate([[1, 2, 3]], max_new_tokens=2)


def _write_store(goods: Goods, folder: Path, pick: random.Random) -> None:
    (entry,) = (path for path in goods.store.iterdir() if not path.name.startswith("."))
    place = folder / entry.name
    shutil.copytree(entry, place, copy_function=os.link)
    file = pick.choice((place / "key.json", place / "key.json", place / "engine" / "manifest.json"))
    tree = json.loads(file.read_text())
    file.unlink()
    _put(file, mutations.spoil_json(tree, pick, ("parts", "files", "schema", "target")), pick)


def _read_store(goods: Goods, folder: Path) -> None:
    from engines.store import Store

    store = Store(folder)
    for key in store.all_keys():
        store.check(store.read(key))
    store.nearest({"name": "x"})


def _write_baseline(goods: Goods, folder: Path, pick: random.Random) -> None:
    baseline, manifest, entry = _baseline(goods)
    baseline.write_baseline(folder / "baseline.json", manifest, entry)
    tree = json.loads((folder / "baseline.json").read_text())
    _put(folder / "baseline.json", mutations.spoil_json(tree, pick, ("engines", "figures", "value", "noise", "checkpoint")), pick)


def _read_baseline(goods: Goods, folder: Path) -> None:
    baseline, manifest, entry = _baseline(goods)
    found = baseline.read_baseline(folder / "baseline.json", manifest)
    now = {name: figure.value for name, figure in entry.figures.items()}
    baseline.table(baseline.compare(found, now))


def _baseline(goods: Goods) -> tuple[Any, Any, Any]:
    from engines.runtime.manifest import read_manifest

    baseline = importlib.import_module("engines.parity.baseline")
    figures = {name: baseline.Figure(1.0, 0.1) for name in ("mean error over noise", "size of the engine, bytes")}
    return baseline, read_manifest(goods.engine), baseline.Entry("fp32", 100, figures)


def _write_signature(goods: Goods, folder: Path, pick: random.Random) -> None:
    from engines.runtime.verdict import SIGNATURE_FILE

    _link_engine(goods, folder, SIGNATURE_FILE)
    tree, key = json.loads(goods.signature.read_text()), goods.key.read_bytes()
    if pick.random() < 0.2:
        key = mutations.spoil_bytes(key, pick)
    elif pick.random() < 0.4:
        inner = mutations.spoil_json(json.loads(base64.b64decode(tree["payload"])), pick, ("subject", "predicate", "digest"))
        tree["payload"] = base64.b64encode(inner).decode()
        (folder / SIGNATURE_FILE).write_text(json.dumps(tree))
    else:
        _put(folder / SIGNATURE_FILE, mutations.spoil_json(tree, pick, ("payload", "payloadType", "signatures", "keyid")), pick)
    _put(folder / "key.pem", key, pick)


def _read_signature(goods: Goods, folder: Path) -> None:
    """As `inspect --require-signature` does; the key is not a file of strangers, but may be the wrong one."""
    from engines.runtime.manifest import read_manifest
    from engines.signing import check_signature

    check_signature(folder, read_manifest(folder), folder / "key.pem")


def _read_checkpoint(goods: Goods, folder: Path) -> None:
    _checkpoint(folder)


READERS = {
    "config.json": Reader(0.17, _write_config, _read_config),
    "safetensors": Reader(0.14, _write_safetensors, _read_checkpoint),
    "shard index": Reader(0.06, _write_index, _read_checkpoint),
    "ckpt.pt": Reader(0.12, _write_research, _read_research),
    "tokenizer files": Reader(0.12, _write_text, _read_text),
    "manifest.json": Reader(0.14, _write_manifest, _read_manifest),
    "parity.json": Reader(0.05, _write_report, _read_report),
    "target": Reader(0.12, _write_target, _read_target),
    "ONNX graph": Reader(0.03, _write_graph, _read_graph),
    "store": Reader(0.05, _write_store, _read_store),
}
if importlib.util.find_spec("engines.parity.baseline") is not None:
    READERS["baseline"] = Reader(0.05, _write_baseline, _read_baseline)
if SIGNS:
    READERS["signature"] = Reader(0.05, _write_signature, _read_signature)


def typed(error: BaseException) -> bool:
    """Whether it is one of ours, and can be shown: printable, in few words."""
    from engines.runtime.errors import ServingError
    from ngpt.errors import NGPTDeployError

    if not isinstance(error, NGPTDeployError | ServingError):
        return False
    with contextlib.suppress(Exception):
        text = str(error)
        return len(text) < 100_000 and all(letter.isprintable() or letter == "\n" for letter in text)
    return False
