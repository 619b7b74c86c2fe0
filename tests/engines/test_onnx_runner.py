"""OnnxRunner: chunked prefill, ragged decode, slots that leave, against the graph run in one piece."""

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from engines.runtime.errors import CapacityError
from engines.runtime.onnx_runner import OnnxRunner
from export.lowerings.onnx import OnnxPortable, OnnxRuntime
from export.network import define_network
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights
from tests.conftest import Golden

# Two orders of summation in float32 differ by the noise the golden bound of 2e-5 already allows.
NOISE = 2e-5


@pytest.fixture(params=["in-place", "growing"])
def runner(request, tmp_path):
    lowering = OnnxRuntime if request.param == "in-place" else OnnxPortable
    with open_checkpoint(Golden("gqa").folder) as checkpoint:
        ops = lowering(DeployedWeights(Weights(checkpoint)))
        ir.save(ops.finish(define_network(ops)), tmp_path / "model.onnx")
        spec = checkpoint.spec
    model = SimpleNamespace(
        vocab_size=spec.vocab_size, max_length=spec.max_length, num_layers=spec.num_layers, num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim, cache_dtype="float32",
    )  # fmt: skip
    target = SimpleNamespace(cache=request.param, providers=("CPUExecutionProvider",))
    return OnnxRunner(tmp_path, SimpleNamespace(model=model, target=target, graph="model.onnx"), num_slots=4, threads=1)


def test_prefill_in_chunks_and_decode_give_golden_logits(runner):
    case = Golden("gqa")
    ids, expected = case.ids[0], case.logits[0]
    slot = runner.open()
    parts = [runner.prefill(slot, part, all_logits=True) for part in (ids[:7], ids[7:8], ids[8:20])]
    steps = [runner.decode([slot], ids[t : t + 1]) for t in range(20, len(ids))]
    got = np.concatenate(parts + steps)
    assert np.abs(got - expected).max() <= NOISE


def test_ragged_decode_with_sequences_joining_and_leaving(runner):
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 256, size) for size in (5, 17, 9, 12)]
    alone = []
    for text in texts:
        slot = runner.open()
        alone.append([runner.prefill(slot, text[:4])] + [runner.decode([slot], text[t : t + 1])[0] for t in range(4, len(text))])
        runner.close(slot)
    slots = [runner.open() for _ in texts]
    for slot, text, want in zip(slots, texts, alone, strict=True):
        assert np.abs(runner.prefill(slot, text[:4]) - want[0]).max() <= NOISE
    live = dict(enumerate(slots))
    for t in range(4, 17):
        for i in [i for i in live if t >= len(texts[i])]:
            runner.close(live.pop(i))  # leaves a hole that another row moves into
        order = sorted(live, reverse=t % 2 == 0)
        got = runner.decode([live[i] for i in order], np.array([texts[i][t] for i in order]))
        for i, logits in zip(order, got, strict=True):
            assert np.abs(logits - alone[i][t - 3]).max() <= NOISE, (t, i)


def test_a_neighbour_that_is_still_reading_its_prompt_is_left_alone(runner):
    ids = Golden("gqa").ids[0]
    first, second, third = runner.open(), runner.open(), runner.open()
    runner.prefill(first, ids[:6])
    runner.prefill(second, ids[:9])  # mid-prompt, between two rows that decode
    runner.prefill(third, ids[:6])
    runner.decode([first, third], ids[6:8])
    rest = runner.prefill(second, ids[9:], all_logits=True)
    assert np.abs(rest - Golden("gqa").logits[0][9:]).max() <= NOISE


def test_too_many_sequences_and_too_long_ones_are_refused(runner):
    slots = [runner.open() for _ in range(4)]
    with pytest.raises(CapacityError, match="free slot"):
        runner.open()
    with pytest.raises(CapacityError, match="512"):
        runner.prefill(slots[0], np.ones(513, np.int64))
