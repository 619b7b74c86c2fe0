"""A TensorRT network defined from a checkpoint, and stepped over its cache by the evaluator (a test double)."""

from contextlib import ExitStack

import numpy as np

from export.lowerings.tensorrt.native import TensorRT
from export.lowerings.tensorrt.weights_file import WeightsFile
from export.network import define_network
from export.precision import TENSORRT
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights
from tests.doubles.tensorrt_evaluator import Evaluator

OLD_FEATURES = ("has_cache_update", "has_rotary", "has_attention", "has_lengths")
"""What older versions lack, as attributes of Library."""


class Network(ExitStack):
    """`builder`, `network`, `spec`, `weights`. A context manager: the network refers to open files."""

    def __init__(self, folder, library, precision="fp32", taps=(), lowering=TensorRT, instead=None):
        super().__init__()
        self.checkpoint = self.enter_context(open_checkpoint(folder))
        scratch = self.enter_context(WeightsFile())
        self.library, self.spec, self.precision = library, self.checkpoint.spec, precision
        self.builder, network = library.create_network()
        self.weights = DeployedWeights(Weights(self.checkpoint), arithmetic=TENSORRT[precision].arithmetic)
        ops = lowering(self.weights, library, network, scratch, TENSORRT[precision])
        self.network = ops.finish(define_network(ops), taps)
        self.evaluate = Evaluator(library.trt, self.network, instead)

    def empty(self, rows):
        """A cache that nobody has written: what lies in it must not matter."""
        shape = (rows, self.spec.num_kv_heads, self.spec.max_length, self.spec.head_dim)
        names = [f"past_key_values.{i}.{kind}" for i in range(self.spec.num_layers) for kind in ("key", "value")]
        return {name: np.full(shape, 7.0, np.float32) for name in names}

    def step(self, ids, start, cache):
        """ids [B, S] at `start` [B] -> (outputs, with logits [B, S, V]; the cache afterwards)."""
        ids, start = np.asarray(ids), np.asarray(start)
        rows, tokens = ids.shape
        feeds = dict(
            cache, input_ids=ids, position_ids=start[:, None] + np.arange(tokens), write_at=start, lengths=start + tokens,
            logit_rows=np.arange(rows * tokens),
        )  # fmt: skip
        out = self.evaluate(feeds)
        out["logits"] = out["logits"].reshape(rows, tokens, -1)
        return out, {name: out[name.replace("past_key_values", "present")] for name in cache}

    def run(self, ids, first=5, chunk=7):
        """One sequence ids [T], read in chunks as a server would: name -> [T, ...] of logits and taps."""
        cache, parts = self.empty(1), []
        for start in (0, *range(first, len(ids), chunk)):
            end = first if start == 0 else start + chunk
            out, cache = self.step(ids[None, start:end], [start], cache)
            parts.append({name: value[0] for name, value in out.items() if not name.startswith("present")})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
