"""A rehearsal of gpu-check's section `rtx`: real plans are built, a double of the device computes the networks they were built from."""

import sys

import pytest
import torch

from engines import build
from engines.runtime import tensorrt_runner
from engines.runtime.manifest import read_manifest
from export.lowerings.tensorrt.library import load_library
from scripts.gpu import machine, rtx
from scripts.gpu.report import Unavailable
from tests.conftest import GOLDEN
from tests.doubles.cuda_double import CudaDouble, decoder
from tests.export.tensorrt_network import Network


@pytest.fixture
def rehearsal(monkeypatch):
    build_engine, networks, library = build.build_engine, [], {}

    def build_and_stand_in(checkpoint, target, output, **options):
        folder = build_engine(checkpoint, target, output, **options)
        manifest = read_manifest(folder)
        networks.append(Network(checkpoint, load_library("tensorrt_rtx"), target.precision.name))
        cuda = CudaDouble(memory=1 << 34)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        sizes = {key: manifest.flags[key] for key in ("prefill_tokens", "decode_batch")}
        library["double"] = decoder(
            cuda, networks[-1].evaluate, manifest.model, plan=(folder / manifest.graph).read_bytes(), **sizes
        )  # fmt: skip
        return folder

    monkeypatch.setattr(build, "build_engine", build_and_stand_in)
    monkeypatch.setattr(tensorrt_runner, "_library", lambda runtime: library["double"])
    monkeypatch.setattr(machine, "require_cuda", lambda: torch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    yield
    for net in networks:
        net.close()


def write_small(folder, layers):
    """In the place of the 8B shape."""
    from ngpt import NGPTConfig, NGPTForCausalLM

    config = NGPTConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    NGPTForCausalLM(config).save_pretrained(folder)


def test_every_row_of_the_section(rehearsal, monkeypatch):
    monkeypatch.setattr("scripts.plan_cost.write_checkpoint", write_small)
    rows = list(rtx.section(GOLDEN, layers=1, context=2048))
    assert not [row for row in rows if row.verdict == "FAILED"]
    found = {row.what: row for row in rows}
    exact = found["golden gqa fp32: largest logit error"]
    assert exact.verdict == "ok" and exact.value <= 2e-5 and "equal 100.0%" in exact.note
    assert all(found[f"golden gqa {p}: largest logit error"].value > 1e-4 for p in ("fp16", "bf16", "int8", "fp8", "int4"))
    for precision in ("fp16", "int4"):
        assert found[f"1 layers {precision}: prefill of 43 tokens"].value > 0
        assert found[f"1 layers {precision}: decode, batch 16"].value > 0


def test_a_wrong_engine_fails_its_row_and_no_other(rehearsal, monkeypatch):
    from tests.doubles import tensorrt_evaluator

    monkeypatch.setattr(tensorrt_evaluator.Evaluator, "_rotary_embedding", lambda self, layer, x, *tables: x)
    row = rtx.parity(GOLDEN / "gqa", "fp32", "12.0")
    assert row.verdict == "FAILED"
    assert rtx.attempt("golden gqa fp9", lambda: rtx.parity(GOLDEN / "gqa", "fp9", "12.0")).verdict == "FAILED"


def test_without_the_package_or_a_device_the_section_says_so(monkeypatch):
    with pytest.raises(Unavailable, match="no CUDA device"):
        list(rtx.section(GOLDEN, 1, 64))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(Unavailable, match="not importable"):
        list(rtx.section(GOLDEN, 1, 64))
