"""Things the runtime's tests share: a byte-level tokenizer, and an engine folder with a double behind it."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.doubles.numpy_runner import NumpyRunner

SPECIAL = ["<s>", "</s>", "<pad>"]
CORPUS = [
    "def main(argv):\n    return [x for x in argv if x]\n",
    "The quick brown fox  jumps over the lazy dog, and then   rests.",
    "naïve café, Größe, señor, Œuvre — “quoted” … ½",
    "日本語のテキスト。中文文本。한국어 텍스트",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 👍🏽 thumbs, 😀😃😄",
    "Привет, мир! שלום עולם مرحبا",
]


@functools.cache
def byte_level() -> Tokenizer:
    """Byte-level BPE with few merges, so that most characters outside ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False), AddedToken(" 漢字", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """Metaspace pieces with byte fallback, as Llama 2's: a leading space goes, unknown characters become <0xNN>."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁the",
        "é",
        ".",
        "\ufffd",
    ]
    merges = [("▁", "a"), ("a", "b")]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def manifest_dict(vocab_size: int = 23, max_length: int = 64, **changes: Any) -> dict[str, Any]:
    """A manifest as the builder writes it, with the double "numpy" for a runtime and no files yet."""
    return {
        "schema_version": 2,
        "name": "double",
        "created": "2026-11-24T05:00:00Z",
        "target": {
            "name": "cpu-fp32", "runtime": "numpy", "providers": ["CPUExecutionProvider"], "precision": "fp32",
            "cache": "in-place", "executed": True, "note": "",
        },
        "model": {
            "architecture": "ngpt", "vocab_size": vocab_size, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
            "num_kv_heads": 1, "head_dim": 8, "max_length": max_length, "cache_dtype": "float32",
            "bos_token_id": 0, "eos_token_ids": [1], "pad_token_id": None,
        },
        "graph": "model.onnx",
        "digests": {"weights": "sha256:00", "spec": "sha256:00", "code": "sha256:00"},
        "tools": {"numpy": "1.26"},
        "flags": {},
        "precision": {"arithmetic": "float32", "cache": "float32", "projections": "float32", "head": "float32", "embedding": "float32"},
        "generation": {"temperature": 0.7, "do_sample": True},
        "files": {},
        "parity": None,
        **changes,
    }  # fmt: skip


def write_engine(folder: Path, tokenizer: Tokenizer | None = None, **changes: Any) -> Path:
    """An engine folder whose graph is a few bytes that only the double needs."""
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(b"not a graph")
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    data = manifest_dict(**changes)
    if "files" not in changes:
        for path in sorted(folder.iterdir()):
            if path.name != "manifest.json":
                raw = path.read_bytes()
                data["files"][path.name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def greedy_reference(runner: NumpyRunner, prompt: list[int], count: int) -> list[int]:
    """Argmax over the whole sequence, anew for each token: no slots, no chunks, no batches."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(runner.reference(tokens)[-1])))
    return tokens[len(prompt) :]
