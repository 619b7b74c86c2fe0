"""Every lowering that can run here: makes an engine with one fault, and gives what the parity check drives: (runner, taps).

ONNX Runtime runs the file that was written. TensorRT's network is the one that TensorRT-RTX holds, computed in NumPy on the memory
that the real runner bound (doubles of CUDA and of the plan); TensorRT-LLM's is computed by a double of its API. So what
is shown of these two is that the gate sees the fault in the network and in the books, not what a GPU would make of it.
"""

import contextlib

import numpy as np

from engines.backends import Job, backend_of
from engines.backends.protocol import Written
from engines.record import record
from engines.runtime.onnx_runner import OnnxRunner
from engines.runtime.slots import Slots
from engines.target import load_target
from export.network import define_network
from export.precision import TENSORRT, TENSORRT_LLM
from export.taps import tap_names
from export.trtllm.parallel import Parallel
from tests.doubles.cuda_double import CudaDouble, decoder
from tests.doubles.modules import swapped
from tests.mutations.files import edit
from tests.mutations.network import OnnxWords, TensorRTWords, TrtllmWords
from tests.mutations.weights import FaultyWeights

SLOTS = 3


def subclass(base, *mixins):
    """The class with the faults before it."""
    return type("Faulty" + base.__name__, (*(m for m in mixins if m is not None), base), {})


class Onnx:
    """ONNX Runtime, a target at a time: the engine folder as a build writes it."""

    runtime = "onnxruntime"

    def __init__(self, target):
        self.target = load_target(target)
        form, precision = self.target.form, self.target.precision.name
        self.kinds = ("onnx", form, precision, f"{form} {precision}")
        self.precision = self.target.precision

    @contextlib.contextmanager
    def engine(self, checkpoint, mutation, folder):
        import onnx_ir as ir

        from export.lowerings.onnx import OnnxPortable, OnnxRuntime

        base = OnnxPortable if self.target.form == "portable" else OnnxRuntime
        weights = FaultyWeights(checkpoint, self.precision.arithmetic, mutation.weights, mutation.spec)
        lowered = subclass(base, mutation.of(mutation.network, self.kinds), OnnxWords)(weights, self.precision)
        graph = folder / "model.onnx"
        ir.save(lowered.finish(define_network(lowered)), graph)
        if mutation.file is not None:
            edit(graph, mutation.file)
        job = Job(checkpoint, self.target, Parallel())
        manifest = record(folder, job, Written(graph.name, {"form": self.target.form}), mutation.name, {})
        runner = subclass(OnnxRunner, mutation.runner, _OnnxBooks)(folder, manifest, SLOTS, threads=1)
        scratch = folder / "taps"
        scratch.mkdir()
        self.stored = backend_of(self.runtime).stored(folder, manifest)
        yield runner, backend_of(self.runtime).taps(folder, manifest, self.precision, scratch)
        runner.release()


class _OnnxBooks:
    """What faults of runners need to change in this one."""

    late = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        run = self._cache.run
        self._cache.run = lambda first, count, ids, mask, at: run(first, count, ids, mask, at + self.late * (ids.shape[1] == 1))
        if hasattr(self, "move"):
            self._cache.move = self.move

    def forget(self, clear):
        self._cache.clear = clear

    def shorten(self, row):
        self._slots.lengths[row] -= 1
        if not self.in_place:
            self._cache._state[row] = [array[:, :, :-1] for array in self._cache._state[row]]


class TensorRT:
    """The network in TensorRT, in native layers or composed for versions that lack them."""

    runtime = "tensorrt"

    def __init__(self, precision, composed=False):
        self.name, self.composed, self.precision = precision, composed, TENSORRT[precision]
        half = "half" if self.precision.arithmetic == "float16" else "whole"
        self.kinds = ("tensorrt", "composed" if composed else "native", half, precision)

    @contextlib.contextmanager
    def engine(self, checkpoint, mutation, folder):
        from engines.runtime.manifest import read_manifest
        from engines.runtime.tensorrt_runner import TensorRTRunner
        from export.lowerings.tensorrt.library import load_library
        from export.lowerings.tensorrt.native import TensorRT as Native
        from export.lowerings.tensorrt.weights_file import WeightsFile
        from tests.doubles.tensorrt_evaluator import Evaluator
        from tests.engines.tensorrt_making import write_engine
        from tests.export.tensorrt_network import OLD_FEATURES, Network

        library = load_library("tensorrt_rtx")
        if self.composed:
            for feature in OLD_FEATURES:
                setattr(library, feature, False)
        spec = checkpoint.spec
        cache = "past-present" if self.composed else "in-place"
        sizes = {"prefill_tokens": 64, "decode_batch": SLOTS + 1}
        write_engine(folder, spec, cache=cache, cache_dtype=self.precision.cache, max_length=spec.max_length, flags=sizes)
        manifest = read_manifest(folder)
        with WeightsFile() as scratch:
            weights = FaultyWeights(checkpoint, self.precision.arithmetic, mutation.weights, mutation.spec)
            faulty = subclass(Native, mutation.of(mutation.network, self.kinds), TensorRTWords)
            _builder, network = library.create_network()
            ops = faulty(weights, library, network, scratch, self.precision)
            logits = define_network(ops)
            names = [name for name in tap_names(spec.num_layers) if name in ops.values]
            net = Network.__new__(Network)
            net.spec, net.evaluate = spec, Evaluator(library.trt, ops.finish(logits, names))
            books = mutation.runner

            def evaluate(feeds):
                late = getattr(books, "late", 0) * (feeds["input_ids"].shape[1] == 1)
                return net.evaluate(feeds | {"position_ids": feeds["position_ids"] + late})

            cuda = CudaDouble(memory=1 << 33)
            double = decoder(cuda, evaluate, manifest.model, cache, **sizes)
            with swapped({"cuda.bindings.runtime": cuda, "tensorrt_rtx": double}, ()):
                runner = subclass(TensorRTRunner, books, _TensorRTBooks)(folder, manifest, SLOTS)

                def taps(ids):
                    seen = Network.run(net, ids, first=len(ids))
                    return {name: _by_token(seen[f"{name}.tap"]) for name in names}

                yield runner, taps
                runner.release()


def _by_token(value):
    """[heads, T, D] or [T, n] as float32 [T, n]."""
    value = value.swapaxes(0, 1) if value.ndim == 3 else value
    return value.reshape(len(value), -1).astype(np.float32)


class _TensorRTBooks:
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if hasattr(self, "move"):
            self._cache.move = self.move

    def shorten(self, row):
        self._slots.lengths[row] -= 1


class TensorRTLLM:
    """The network of TensorRT-LLM's engine flow, one rank."""

    runtime = "tensorrt_llm"

    def __init__(self, precision):
        self.precision = TENSORRT_LLM[precision]
        self.kinds = ("tensorrt-llm", precision)

    @contextlib.contextmanager
    def engine(self, checkpoint, mutation, folder):
        from export.trtllm.convert import convert
        from export.trtllm.lowering import TensorRTLLM as Base
        from tests.trtllm import serving

        weights = FaultyWeights(checkpoint, self.precision.arithmetic, mutation.weights, mutation.spec)
        convert(weights, folder, Parallel(), self.precision)
        usual, serving.MAX_LEN = serving.MAX_LEN, checkpoint.spec.max_length
        try:
            engine = serving.Engine(folder, slots=SLOTS)
            (model,) = engine.models
            faulty = subclass(Base, mutation.of(mutation.network, self.kinds), TrtllmWords)
            type(model).forward.__globals__["TensorRTLLM"] = faulty
            runner = subclass(TrtllmRunner, mutation.runner)(engine, checkpoint.spec)
            yield runner, runner.taps
        finally:
            serving.MAX_LEN = usual


class TrtllmRunner:
    """TEST DOUBLE of TensorRT-LLM's batch manager behind the check's runner: a request in flight is a slot."""

    late = 0

    def __init__(self, engine, spec):
        self.engine, self.num_slots = engine, engine.slots
        self.vocab_size, self.max_length = spec.vocab_size, spec.max_length
        self._names = tap_names(spec.num_layers, fine=False)
        self._slots = Slots(self.num_slots, self.max_length)

    def open(self):
        return self._slots.open()

    def close(self, slot):
        self._slots.close(slot, getattr(self, "move", self._move))

    def _move(self, source, target, length):
        """Requests keep their blocks: the table of blocks moves."""
        blocks = self.engine.blocks
        blocks[[source, target]] = blocks[[target, source]]
        return True

    def release(self):
        pass

    def shorten(self, row):
        self._slots.lengths[row] -= 1

    def _step(self, requests):
        """Requests by row. Positions are what `Engine.step` makes of the lengths; `late` shifts those of decoded tokens."""
        for row, _, _ in requests:
            self.engine.lengths[row] = int(self._slots.lengths[row])
        run = self.engine._run
        if self.late and not requests[0][2]:
            self.engine._run = lambda rank, common, asked, tokens, places: run(rank, common, asked, tokens, places + 1)
        try:
            logits = self.engine.step(requests)
        finally:
            self.engine._run = run
        for row, tokens, _ in requests:
            self._slots.lengths[row] += len(tokens)
        return logits

    def prefill(self, slot, tokens, *, all_logits=False):
        logits = self._step([(self._slots.row(slot), np.asarray(tokens), True)])[0]
        return logits if all_logits else logits[-1]

    def decode(self, slots, tokens):
        rows = [(self._slots.row(slot), np.asarray([token]), False) for slot, token in zip(slots, tokens, strict=True)]
        return np.concatenate(self._step(rows))

    def taps(self, ids):
        slot = self._slots.open()
        self._slots.lengths[self._slots.row(slot)] = 0
        self.prefill(slot, ids)
        seen = self.engine.models[0]._network_outputs
        self._slots.lengths[self._slots.row(slot)] = 0
        self._slots.close(slot, lambda *_: True)
        return {name: seen[name].data.float().numpy() for name in self._names}


LOWERINGS = {
    "onnx fused, fp32": lambda: Onnx("cpu-fp32"),
    "onnx fused, int8": lambda: Onnx("cpu-int8"),
    "onnx fused, int4": lambda: Onnx("cpu-int4"),
    "onnx portable": lambda: Onnx("onnx-portable"),
    "tensorrt, fp32": lambda: TensorRT("fp32"),
    "tensorrt, fp16": lambda: TensorRT("fp16"),
    "tensorrt, int4": lambda: TensorRT("int4"),
    "tensorrt composed, fp32": lambda: TensorRT("fp32", composed=True),
    "tensorrt-llm, fp32": lambda: TensorRTLLM("fp32"),
}
"""Name -> what makes and runs an engine of it."""
