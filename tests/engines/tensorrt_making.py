"""Engine folders for TensorRTRunner's tests, with the doubles of tests/doubles/cuda_double.py in place of CUDA and TensorRT."""

from __future__ import annotations

import hashlib
import json
import sys
from types import SimpleNamespace

from engines.runtime.manifest import read_manifest
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights
from tests.conftest import GOLDEN
from tests.doubles.cached_reference import CachedReference
from tests.doubles.cuda_double import PLAN, CudaDouble, decoder
from tests.doubles.reference import Reference

VERSION = "1.7.1.116"


def write_engine(folder, spec, *, cache="in-place", cache_dtype="float32", max_length=64, plan=PLAN, flags=None, **changes):
    """The folder a build would write for the double's plan; changes replace whole keys of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.engine").write_bytes(plan)
    manifest = {
        "schema_version": 2, "name": "golden", "created": "2026-11-24T05:00:00Z",
        "target": {
            "name": "rtx-fp16", "runtime": "tensorrt_rtx", "providers": [], "precision": "fp16", "cache": cache,
            "executed": False, "note": "",
        },
        "model": {
            "architecture": "ngpt", "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size,
            "num_layers": spec.num_layers, "num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim, "max_length": max_length, "cache_dtype": cache_dtype, "bos_token_id": None,
            "eos_token_ids": [2], "pad_token_id": None,
        },
        "precision": {
            "arithmetic": "float16", "cache": cache_dtype, "projections": "float16", "head": "float16", "embedding": "float16",
        },
        "graph": "model.engine", "digests": {}, "tools": {"tensorrt_rtx": VERSION},
        "flags": {"prefill_tokens": 8, "decode_batch": 4, "compute_capability": "12.0"} | (flags or {}),
        "files": {"model.engine": {"bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}},
        "parity": None,
    }  # fmt: skip
    for key, value in changes.items():
        manifest[key] = manifest[key] | value if isinstance(value, dict) else value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def install(monkeypatch, cuda, library, name="tensorrt_rtx"):
    """Make the doubles what an import of the libraries finds."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, name, library)


def golden_engine(folder, monkeypatch, case="gqa", cache="in-place", wrap=lambda evaluate: evaluate, **options):
    """Folder, manifest and doubles for a golden checkpoint; `wrap` may spoil the network."""
    with open_checkpoint(GOLDEN / case) as checkpoint:
        weights = Weights(checkpoint)
        network, reference = CachedReference(weights), Reference(weights)
    manifest = read_manifest(write_engine(folder, network.spec, cache=cache, **options))
    cuda = CudaDouble()
    library = decoder(cuda, wrap(network.evaluate), manifest.model, cache)
    install(monkeypatch, cuda, library)
    return SimpleNamespace(folder=folder, manifest=manifest, cuda=cuda, library=library, reference=reference)
