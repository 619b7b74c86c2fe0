"""The TensorRT network with plugins: golden logits through the kernels' own sources, and the same as the native layers say.

The layers around the plugins are TensorRT-RTX's, computed by tests/doubles/tensorrt_evaluator.py; the kernels run in emulation.
"""

from functools import partial

import numpy as np
import pytest

from export.lowerings.tensorrt import plugins as tensorrt_plugins
from export.lowerings.tensorrt.library import load_library
from export.lowerings.tensorrt.plugins import TensorRTPlugins
from export.plugins.kernels import HypersphereUpdate, QKNorm
from ngpt.checkpoint import open_checkpoint
from tests.conftest import ALL_CASES, GOLDEN, Golden
from tests.doubles.emulator import Emulator
from tests.doubles.plugin_layers import PluginLayers
from tests.export.tensorrt_network import Network

TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def kernels_of(case, precision):
    """The kernels a case needs, from its spec alone."""
    with open_checkpoint(GOLDEN / case) as checkpoint:
        spec = checkpoint.spec
    scaled = spec.mlp_eps * (spec.hidden_size**-0.25) ** 2 if precision == "fp16" and not spec.gated else spec.mlp_eps
    found = [HypersphereUpdate(spec.hidden_size, eps, TYPES[precision]) for eps in (0.0, scaled)]
    if spec.position == "rope":
        found.append(QKNorm(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim, TYPES[precision]))
    return found


RUNS = [*((case, "fp32") for case in ALL_CASES), ("gqa", "fp16"), ("gqa", "bf16"), ("dead-mlp", "fp16")]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    wanted = [kernel for case, precision in RUNS for kernel in kernels_of(case, precision)]
    return Emulator(wanted, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def plugins(emulator, monkeypatch):
    """(library, stand-in for the registration)."""
    library = load_library("tensorrt_rtx")
    kinds = library.trt.DataType
    layers = PluginLayers(library.trt, emulator.launch, {kinds.FLOAT: "float32", kinds.HALF: "float16", kinds.BF16: "bfloat16"})
    monkeypatch.setattr(tensorrt_plugins, "registration", layers)
    return library, layers


@pytest.mark.parametrize("case, precision", RUNS)
def test_the_kernels_compute_golden_logits_inside_the_network(case, precision, plugins):
    library, layers = plugins
    golden = Golden(case)
    lowering = partial(TensorRTPlugins, architecture=90)
    errors = {}
    with (
        Network(golden.folder, library, precision, lowering=lowering, instead=layers.results) as fused,
        Network(golden.folder, library, precision) as native,
    ):
        for name, net in (("fused", fused), ("native", native)):
            got = [net.run(golden.ids[row][real])["logits"] - golden.logits[row][real] for row, real in enumerate(golden.real)]
            errors[name] = np.concatenate(got)
        spec, mlp_eps = fused.spec, fused.weights.mlp_eps
    if precision == "fp32":
        assert np.abs(errors["fused"]).max() <= 2e-5
    # In half precision both forms round the same tensors; neither may be more than half again as far from the truth.
    assert np.sqrt(np.mean(errors["fused"] ** 2)) <= 1.5 * np.sqrt(np.mean(errors["native"] ** 2)) + 1e-6
    # Too small to show in the logits of these cases: that each update got its own eps is looked up.
    found = [kernel.eps for kernel, _ in layers.kernels if isinstance(kernel, HypersphereUpdate)]
    assert found == [0.0, mlp_eps] * spec.num_layers
    kinds = [type(kernel) for kernel, _ in layers.kernels]
    assert kinds.count(HypersphereUpdate) == 2 * spec.num_layers
    assert kinds.count(QKNorm) == (spec.num_layers if spec.position == "rope" else 0)
    assert {architecture for _, architecture in layers.kernels} == {90}


def test_sizes_the_kernels_do_not_take_use_native_layers(plugins, tmp_path):
    from tests.export.test_variants import Case

    library, layers = plugins
    case = Case({"head_dim": 12, "hidden_size": 52}, tmp_path / "checkpoint")
    with Network(case.folder, library, lowering=TensorRTPlugins, instead=layers.results) as net:
        got = np.stack([net.run(ids)["logits"] for ids in case.ids])
    assert not layers.kernels
    assert np.abs(got - case.logits).max() <= 2e-5
