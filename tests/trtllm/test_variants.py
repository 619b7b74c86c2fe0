"""Every variant of the architecture on the double of TensorRT-LLM, divided 4 x 2 ways, against PyTorch in float64."""

import numpy as np
import pytest

from export.trtllm.parallel import Parallel
from ngpt.errors import UnsupportedError
from tests.export.test_variants import VARIANTS, Case
from tests.trtllm.serving import Engine, converted


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gelu"])
def test_every_variant(name, tmp_path):
    case = Case(VARIANTS[name], tmp_path / "checkpoint")
    (tmp_path / "converted").mkdir()
    engine = Engine(converted(case.folder, tmp_path / "converted", Parallel(4, 2)), 8)
    got = engine.read(0, case.ids[0][:20], chunks=(8, 9))
    assert np.abs(got - case.logits[0][:20]).max() <= 2e-5 * max(1.0, np.abs(case.logits).max() / 10)


def test_the_exact_gelu_is_refused_by_name(tmp_path):
    case = Case(VARIANTS["gelu"], tmp_path / "checkpoint")
    with pytest.raises(UnsupportedError, match="hidden_act.*gelu"):
        converted(case.folder, tmp_path)
