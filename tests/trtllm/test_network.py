"""The traced network against golden data, on a double of TensorRT-LLM's API: packed and padded, chunked, in flight, divided."""

import numpy as np
import pytest
import torch

from export.trtllm.parallel import Parallel
from tests.conftest import GOLDEN, Golden
from tests.trtllm.serving import Engine, converted

LOGIT_ERROR = 2e-5
DIVISIONS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)]


def error(got, want):
    return np.abs(got - want).max()


@pytest.mark.parametrize(("tp", "pp"), DIVISIONS)
def test_packed_chunked_prefill_and_decode_compute_golden_logits(golden, tp, pp, tmp_path):
    """tp 4 is more than the two key heads of most cases, and pp 3 is one layer a stage."""
    pp = min(pp, 2 if golden.name == "research-checkpoint" else 3)
    engine = Engine(converted(golden.folder, tmp_path, Parallel(tp, pp)), tp * pp)
    for row, real in enumerate(golden.real):
        ids = golden.ids[row][real][:40]
        got = engine.read(row % engine.slots, ids, chunks=(5, 7, len(ids) - 16))
        assert got.dtype == np.float32
        assert error(got, golden.logits[row][real][:40]) <= LOGIT_ERROR
        engine.lengths = [0] * engine.slots
