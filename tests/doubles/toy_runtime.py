"""TEST DOUBLE: a whole runtime that the project does not know. NumPy computes the network as it is stated, at once and without a cache.

What a runtime needs is here and nothing more: a lowering (`ToyLowering`), a backend (`ToyBackend`), a runner (`ToyRunner`), and a name that
is registered for each. Weights lie in one .npz, quantised where the precision says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from engines.backends import Written
from engines.memory import total_bytes
from engines.runtimes import Runtime
from export.lowerings.base import Lowering
from export.network import define_network
from export.precision import Format, Precision, plain
from export.weights import rope_tables

NAME, GRAPH = "toy", "model.npz"
EIGHT = Format("int8", 64)
PRECISIONS = {"fp32": plain("fp32", "float32"), "int8": Precision("int8", "float32", EIGHT, EIGHT, Format("float32"), "float32")}
ACTIVATIONS = {
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


class ToyLowering(Lowering[np.ndarray]):
    """The vocabulary over float64 arrays, of tokens [B, S] known from the start. Composed operations are left as they are."""

    def __init__(self, weights, ids):
        super().__init__(weights)
        self.ids, self.taps = ids, {}

    def embedding(self, name):
        return self.keep(name, self.weights.get("embed").astype(np.float64)[self.ids])

    def linear(self, name, x):
        y = x @ self.weights.get(f"{name}.weight").astype(np.float64).T
        return y + self.weights.get(f"{name}.bias") if self.weights.has(f"{name}.bias") else y

    def split_heads(self, name, x, heads):
        return x.reshape(*x.shape[:2], heads, -1)

    def position(self, name, x):
        cos, sin = (table[: x.shape[1], None, :] for table in rope_tables(self.spec))
        half = cos.shape[-1]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate((a * cos - b * sin, b * cos + a * sin, rest), -1)

    def l2norm(self, name, x, eps=0.0):
        length = np.linalg.norm(x, axis=-1, keepdims=True) + eps
        return np.divide(x, length, out=np.zeros_like(x), where=length > 0)

    def vector(self, weight):
        return self.weights.get(weight).astype(np.float64)

    def head_vector(self, weight, heads):
        return self.vector(weight).reshape(heads, -1)

    def add(self, name, x, y):
        return x + y

    def sub(self, name, x, y):
        return x - y

    def mul(self, name, x, y):
        return x * y

    def activation(self, name, kind, x):
        return ACTIVATIONS[kind](x)

    def attention(self, name, layer, q, k, v, scale):
        groups = self.spec.num_heads // self.spec.num_kv_heads
        k, v = np.repeat(k, groups, 2), np.repeat(v, groups, 2)
        scores = scale * np.einsum("bqhd,bkhd->bhqk", q, k)
        scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("bhqk,bkhd->bqhd", share / share.sum(-1, keepdims=True), v).reshape(*q.shape[:2], -1)

    def hypersphere_update(self, name, h, x, rate, eps):
        return self.keep(name, super().hypersphere_update(name, h, x, rate, eps))

    def keep(self, name, x):
        self.taps[name] = x
        return x


class ToyBackend:
    """The door: what `build_engine` asks."""

    runtime = Runtime(NAME, PRECISIONS, caches=("growing",))

    def tools(self):
        return {"numpy": np.__version__}

    def check(self, spec, target, parallel):
        assert spec.mlp in ACTIVATIONS and spec.position == "rope"

    def estimate(self, spec, target, parallel):
        return total_bytes(spec, target.precision) + (1 << 20)

    def write(self, job, folder, progress):
        arrays = {}
        for done, name in enumerate(job.weights.names()):
            progress(f"writing {name}", done / len(job.weights.names()))
            form = job.target.precision.format_of(name)
            value = job.weights.get(name)
            if name.endswith(".weight") and not form.plain:
                stored = form.quantize(value)
                arrays |= {f"{name}.data": stored.data, f"{name}.scales": stored.scales}
            arrays[name] = np.asarray(value.shape) if f"{name}.data" in arrays else value
        arrays["spec"] = np.asarray(json.dumps(job.spec.to_dict()))
        np.savez(folder / GRAPH, **arrays)
        return Written(GRAPH, {"form": job.target.form})

    def taps(self, folder, manifest, precision, scratch):
        weights = Stored(folder / manifest.graph, precision)

        def run(ids):
            ops = ToyLowering(weights, ids[None])
            define_network(ops)
            return {name: value[0].astype(np.float32) for name, value in ops.taps.items()}

        return run

    def stored(self, folder, manifest):
        return None

    def outline(self, job, folder):
        return [f"write {folder / GRAPH}"]


class Stored:
    """Weights of an engine's file, as a lowering takes them."""

    def __init__(self, path, precision):
        from ngpt.spec import NGPTSpec

        self.arrays, self.precision = dict(np.load(path, allow_pickle=False)), precision
        fields = json.loads(str(self.arrays.pop("spec")))
        self.spec = NGPTSpec(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
        self.mlp_eps = self.spec.mlp_eps

    def has(self, name):
        return name in self.arrays

    def get(self, name):
        if f"{name}.data" not in self.arrays:
            return self.arrays[name]
        from export.quantize import Quantized

        bits = 8
        return Quantized(bits, self.arrays[f"{name}.data"], self.arrays[f"{name}.scales"], int(self.arrays[name][1])).dequantize()


class ToyRunner:
    """The scheduler's side: every step computes the whole sequence again."""

    def __init__(self, folder: Path, manifest, num_slots, threads=None):
        self.weights = Stored(folder / manifest.graph, PRECISIONS[manifest.target.precision])
        self.vocab_size, self.max_length, self.num_slots = manifest.model.vocab_size, manifest.model.max_length, num_slots
        self.slots = {}

    def open(self):
        slot = min(set(range(self.num_slots)) - set(self.slots))
        self.slots[slot] = []
        return slot

    def close(self, slot):
        del self.slots[slot]

    def release(self):
        self.slots.clear()

    def prefill(self, slot, tokens, *, all_logits=False):
        self.slots[slot] += [int(token) for token in tokens]
        logits = define_network(ToyLowering(self.weights, np.asarray([self.slots[slot]])))[0, -len(tokens) :].astype(np.float32)
        return logits if all_logits else logits[-1]

    def decode(self, slots, tokens):
        return np.stack([self.prefill(slot, [token]) for slot, token in zip(slots, tokens, strict=True)])
