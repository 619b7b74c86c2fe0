"""Fixtures shared by the whole suite: golden cases and, built once a session, the example's engine."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "examples" / "ngpt-tiny"
HF_CASES = ("gqa", "gqa-left-padded", "llama3-rope-bias", "dead-mlp")
ALL_CASES = (*HF_CASES, "research-checkpoint", "research-train-py")


class Golden:
    """A golden case: `folder`, and the arrays of golden.npz; `mask` is all ones where the case has none."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, GOLDEN / name
        with np.load(self.folder / "golden.npz") as data:
            self.arrays = {key: data[key] for key in data.files}
        self.ids = self.arrays["input_ids"].astype(np.int64)
        self.mask = self.arrays.get("attention_mask", np.ones_like(self.ids)).astype(np.int64)
        self.real = self.mask.astype(bool)

    def __getattr__(self, key: str):
        return self.arrays[key]


@pytest.fixture(params=HF_CASES)
def hf_case(request):
    return Golden(request.param)


@pytest.fixture(params=ALL_CASES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="session")
def tiny_engine_folder(tmp_path_factory):
    """The example's cpu-int8 engine, built and verified once."""
    from engines.build import build_engine

    return build_engine(TINY, "cpu-int8", tmp_path_factory.mktemp("engine") / "ngpt-tiny")
