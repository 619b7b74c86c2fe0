"""Registration against TensorRT's own plugin code (tests/doubles/tensorrt_builder.py says what of it is real).

Run by test_registration.py in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: make env")

from export.plugins import registration
from export.plugins.compile import parameters
from export.plugins.kernels import HypersphereUpdate, QKNorm
from ngpt.errors import BuildError, MissingPackageError, UnsupportedError
from tests.conftest import ROOT
from tests.doubles import tensorrt_builder

WIDTHS = {"INT32": "u32"}


def plugin_folder():
    """The files of tensorrt.plugin: of the wheel that is installed, or of another, unpacked, named in the environment."""
    named = os.environ.get("NGPT_TENSORRT_BINDINGS")
    places = [Path(named)] if named else [Path(place) / "tensorrt_bindings" for place in sys.path if place]
    found = [place / "plugin" for place in places if (place / "plugin" / "_validate.py").exists()]
    if not found:
        pytest.skip("tensorrt-cu13-bindings is not installed: make env")
    return found[0]


@pytest.fixture
def trt(monkeypatch):
    registration.register.cache_clear()
    module = tensorrt_builder.install(plugin_folder(), monkeypatch)
    yield module
    registration.register.cache_clear()
    for creator in list(module.get_plugin_registry().all_creators):
        if creator.plugin_namespace == "ngpt":
            module.get_plugin_registry().deregister_creator(creator)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    return request.param


def update_inputs(trt, network, dtype, dims=(-1, -1, 192)):
    kind = getattr(trt, dtype)
    return [
        network.add_input("h", kind, dims),
        network.add_input("x", kind, dims),
        network.add_input("lr", trt.float32, (192,)),
    ]


def norm_inputs(trt, network, dtype):
    return [
        network.add_input("qk", getattr(trt, dtype), (-1, -1, 6 * 64)),
        network.add_input("cos", trt.float32, (512, 16)),
        network.add_input("sin", trt.float32, (512, 16)),
        network.add_input("positions", trt.int32, (-1, -1)),
        network.add_input("q_scale", trt.float32, (256,)),
    ]


NORM_SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 64}
SHAPES = {
    "h": (3, 7, 192), "x": (3, 7, 192), "lr": (192,),
    "qk": (3, 7, 384), "cos": (512, 16), "sin": (512, 16), "positions": (3, 7), "q_scale": (256,),
}  # fmt: skip


def check_launch(layer, kernel, count):
    assert layer.name == kernel.name.encode()
    assert parameters(layer.ptx.decode(), kernel.name) == kernel.parameters
    assert [WIDTHS[kind.name] for kind, _ in layer.integers] == [kind for kind in kernel.parameters if kind == "u32"]
    x, y = kernel.block
    assert layer.launch == {
        "grid_x": kernel.grid(count), "grid_y": 1, "grid_z": 1, "block_x": x, "block_y": y, "block_z": 1, "shared_mem": 0,
    }  # fmt: skip


def test_hypersphere_update(trt, dtype):
    network = tensorrt_builder.Network(trt, SHAPES)
    out = registration.hypersphere_update(network, *update_inputs(trt, network, dtype), eps=1e-6, architecture=90)
    assert out.shape == (3, 7, 192) and out.dtype == getattr(trt, dtype)
    (layer,) = network.layers
    kernel = HypersphereUpdate(192, 1e-6, dtype)
    check_launch(layer, kernel, 21)
    assert [value for _, value in layer.integers] == [21]
    assert b".target sm_90" in layer.ptx
    assert len(layer.combinations) == 4  # one combination: the network's own types


def test_qk_norm(trt, dtype):
    network = tensorrt_builder.Network(trt, SHAPES)
    q, k = registration.qk_norm(network, *norm_inputs(trt, network, dtype), **NORM_SIZES)
    assert q.shape == (3, 4, 7, 64) and k.shape == (3, 2, 7, 64) and q.dtype == k.dtype == getattr(trt, dtype)
    (layer,) = network.layers
    check_launch(layer, QKNorm(4, 2, 64, 32, dtype), 21)
    assert [value for _, value in layer.integers] == [21, 7, 512]
    assert len(layer.combinations) == 7


def test_two_layers_keep_their_own_constants(trt):
    network = tensorrt_builder.Network(trt, SHAPES)
    inputs = update_inputs(trt, network, "float16")
    for eps in (0.0, 1e-6):
        registration.hypersphere_update(network, *inputs, eps=eps)
    first, second = network.layers
    assert first.ptx != second.ptx  # eps is in the code, for attributes are not kept


def test_the_real_validators_refuse_what_they_should(trt):
    """The double does not wave things through: TensorRT's own checks run, and see a wrong order and a missing hint."""
    import tensorrt.plugin as trtp

    plugins = registration.register()
    network = tensorrt_builder.Network(trt, SHAPES)
    h, x, lr = update_inputs(trt, network, "float32")
    with pytest.raises(ValueError, match="schema"):
        plugins.hypersphere_update(h, x, lr, eps=1e-6, size=192, architecture=80)
    with pytest.raises(ValueError, match="type"):
        plugins.hypersphere_update(h, x, lr, size=192, eps=0, architecture=80)
    with pytest.raises(ValueError, match="annotation"):

        @trtp.aot_impl("ngpt::hypersphere_update")
        def without_annotation(h, x, lr, size: int, eps: float, architecture: int, outputs, tactic): ...


def test_inputs_that_do_not_fit_are_named(trt):
    network = tensorrt_builder.Network(trt, SHAPES)
    h, x, lr = update_inputs(trt, network, "float16")
    other = network.add_input("other", trt.float32, (-1, -1, 192))
    with pytest.raises(BuildError, match=r"input x .*FLOAT"):
        registration.hypersphere_update(network, h, other, lr, eps=0.0)
    short = network.add_input("short", trt.float32, (191,))
    with pytest.raises(BuildError, match=r"input lr .*\[192\].*\[191\]"):
        registration.hypersphere_update(network, h, x, short, eps=0.0)
    integers = network.add_input("integers", trt.int32, (-1, -1, 192))
    with pytest.raises(UnsupportedError, match="type of a plugin's input"):
        registration.hypersphere_update(network, integers, x, lr, eps=0.0)
    unknown = network.add_input("unknown", trt.float16, (-1, -1, -1))
    with pytest.raises(BuildError, match="fixed size"):
        registration.hypersphere_update(network, unknown, x, lr, eps=0.0)
    inputs = norm_inputs(trt, network, "float16")
    with pytest.raises(BuildError, match="shape of qk"):
        registration.qk_norm(network, *inputs, heads=5, kv_heads=2, head_dim=64)
    inputs[3] = network.add_input("wide", trt.int64, (-1, -1))
    with pytest.raises(BuildError, match="input positions"):
        registration.qk_norm(network, *inputs, **NORM_SIZES)


def test_a_layer_that_tensorrt_refuses(trt, monkeypatch):
    network = tensorrt_builder.Network(trt, SHAPES)
    inputs = update_inputs(trt, network, "float16")
    monkeypatch.setattr(network, "add_plugin", lambda call, aot: None)
    with pytest.raises(BuildError, match="refused the plugin hypersphere_update"):
        registration.hypersphere_update(network, *inputs, eps=0.0)


def test_without_tensorrt():
    code = "from export.plugins.registration import register\nregister()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert MissingPackageError.__name__ in run.stderr and "pip install 'tensorrt>=10.14'" in run.stderr
