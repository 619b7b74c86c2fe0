"""The TensorRT lowering: the network that TensorRT-RTX holds, evaluated against golden data, and real plans built from it.

Evaluated by tests/doubles/tensorrt_evaluator.py, our reading of each layer's documented meaning: no GPU is needed, and none is proven.
"""

from contextlib import ExitStack

import numpy as np
import pytest

from export.lowerings.spool import Spool
from export.lowerings.tensorrt import ARITHMETIC, TensorRT
from export.lowerings.tensorrt_api import load_library
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import BuildError, UnsupportedError
from ngpt.weights import Weights
from tests.conftest import GOLDEN, Golden
from tests.doubles.tensorrt_evaluator import Evaluator

LOGIT_ERROR = 2e-5
SPOOLS = ExitStack()


@pytest.fixture
def library():
    with SPOOLS:
        yield load_library("tensorrt_rtx")


class Network:
    """A defined network with what it refers to, and its evaluation over a cache."""

    def __init__(self, folder, library, precision="fp32", taps=()):
        self.library = library
        with open_checkpoint(folder) as checkpoint:
            self.spec, self.spool = checkpoint.spec, SPOOLS.enter_context(Spool())
            self.builder, network = library.create_network()
            weights = DeployedWeights(Weights(checkpoint), half_precision=ARITHMETIC[precision] == "fp16")
            self.lowering = TensorRT(weights, library, network, self.spool, precision)
            self.network = self.lowering.define(taps)
        self.evaluate = Evaluator(library.trt, self.network)

    def empty(self, rows):
        shape = (rows, self.spec.num_kv_heads, self.spec.max_length, self.spec.head_dim)
        names = [f"past_key_values.{i}.{kind}" for i in range(self.spec.num_layers) for kind in ("key", "value")]
        # What lies in a cache that nobody has written yet must not matter.
        return {name: np.full(shape, 7.0, np.float32) for name in names}

    def step(self, ids, start, cache):
        """ids [B, S] at `start` [B]: (outputs, the cache afterwards); logits [B, S, V]."""
        ids, start = np.asarray(ids), np.asarray(start)
        rows, tokens = ids.shape
        feeds = dict(
            cache, input_ids=ids, position_ids=start[:, None] + np.arange(tokens), write_at=start, lengths=start + tokens,
            logit_rows=np.arange(rows * tokens),
        )  # fmt: skip
        out = self.evaluate(feeds)
        out["logits"] = out["logits"].reshape(rows, tokens, -1)
        return out, {name: out[name.replace("past_key_values", "present")] for name in cache}


@pytest.mark.parametrize("form", ["native", "composed"])
def test_the_network_tensorrt_holds_computes_golden_logits(golden, library, form, monkeypatch):
    """`composed` is for versions without cache-update, rotary and attention layers."""
    if form == "composed":
        for feature in ("has_cache_update", "has_rotary", "has_attention", "has_lengths"):
            monkeypatch.setattr(library, feature, False)
    names = ["embed", *(f"layers.{i}.mlp.update" for i in range(Golden_layers(golden)))]
    net = Network(golden.folder, library, taps=names)
    for row, real, expected in zip(range(len(golden.ids)), golden.real, golden.logits, strict=True):
        ids = golden.ids[row][real][None]
        got, cache = net.step(ids[:, :5], [0], net.empty(1))
        parts = [got]
        for t in range(5, ids.shape[1], 7):  # further chunks read what is in the cache
            got, cache = net.step(ids[:, t : t + 7], [t], cache)
            parts.append(got)
        logits = np.concatenate([p["logits"] for p in parts], axis=1)[0]
        assert np.abs(logits - expected[real]).max() <= LOGIT_ERROR
        if "hidden_states" in golden.arrays:
            for name, want in zip(names, golden.hidden_states, strict=True):
                tap = np.concatenate([p[f"{name}.tap"] for p in parts], axis=1)[0]
                assert np.abs(tap - want[row][real]).max() <= 2e-6, name


def Golden_layers(case):  # noqa: N802
    with open_checkpoint(case.folder) as checkpoint:
        return checkpoint.spec.num_layers
