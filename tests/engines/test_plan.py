"""Real TensorRT-RTX plans, built without a GPU: every compute capability it offers, every precision, refusals by name."""

import json

import pytest

from engines.backends.tensorrt import DECODE, PREFILL, build_plan
from engines.build import build_engine
from engines.target import Gpu, Profile, Target, load_target, target_names
from export.lowerings.onnx import OnnxPortable
from export.lowerings.tensorrt import plugins as tensorrt_plugins
from export.lowerings.tensorrt.library import load_library
from export.network import define_network
from export.precision import TENSORRT
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import BuildError, MissingPackageError, TargetError
from ngpt.weights import Weights
from tests.conftest import ALL_CASES, GOLDEN, TINY, Golden
from tests.doubles.plugin_layers import PluginLayers

PROFILE = Profile(prefill_tokens=32, decode_batch=4)


@pytest.fixture(scope="module")
def library():
    return load_library("tensorrt_rtx")


def capabilities():
    known = load_library("tensorrt_rtx").trt.ComputeCapability
    return sorted(n for n in dir(known) if n.startswith("SM"))


def target(capability, precision="fp16"):
    gpu = Gpu(capability, 32, 1000)
    return Target("test", "", "tensorrt_rtx", "native", TENSORRT[precision], "in-place", False, "", gpu=gpu, profile=PROFILE)


def build(folder, chosen, library, path):
    with open_checkpoint(folder) as checkpoint:
        weights = DeployedWeights(Weights(checkpoint), arithmetic=chosen.precision.arithmetic)
        return build_plan(weights, chosen, library, path)


def dotted(name):
    return f"{name[2:-1]}.{name[-1]}" if name else ""


@pytest.mark.parametrize("name", [*capabilities(), ""])
@pytest.mark.parametrize("case", [*ALL_CASES, "ngpt-tiny"])
def test_every_compute_capability_the_library_offers(case, name, library, tmp_path):
    folder = TINY if case == "ngpt-tiny" else GOLDEN / case
    size = build(folder, target(dotted(name)), library, tmp_path / "model.engine")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) or (folder / "ckpt.pt").stat().st_size
    # The plan holds the weights (stored in 16 bits; the golden files in 32) and kernels beside them.
    assert size == (tmp_path / "model.engine").stat().st_size > weights / 2
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]


@pytest.mark.parametrize("precision", load_target("rtx-5090").precisions)
def test_every_precision_of_a_target_builds(precision, library, tmp_path):
    size = build(GOLDEN / "gqa", target("12.0", precision), library, tmp_path / "model.engine")
    assert size > 100_000


def test_one_layer_of_the_8b_shape_builds(library, tmp_path):
    from scripts.plan_cost import measure

    rows = measure("rtx-5090", None, [1, 2])
    layer = 2 * (4096 * 128 * (32 + 8 + 8 + 32) + 2 * 4096 * 21504)
    assert rows[1]["plan_bytes"] - rows[0]["plan_bytes"] == pytest.approx(layer, rel=0.05)
    assert rows[0]["plan_bytes"] > layer and rows[2]["layers"] == 32


def test_narrow_weights_stay_narrow_in_the_plan(library, tmp_path):
    """On matrices large enough to outweigh the kernels: the layer of tests/golden is not."""
    from ngpt import NGPTConfig, NGPTForCausalLM

    config = NGPTConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        head_dim=128, max_position_embeddings=256,
    )  # fmt: skip
    NGPTForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    sizes = {p: build(tmp_path / "checkpoint", target("12.0", p), library, tmp_path / p) for p in ("fp16", "int8", "fp8", "int4")}
    matrices = 1024 * (128 * 20 + 2 * 4096)
    assert sizes["fp16"] - sizes["int8"] > 0.9 * matrices and sizes["fp16"] - sizes["fp8"] > 0.9 * matrices
    assert sizes["int8"] - sizes["int4"] > 0.35 * matrices  # half a byte less, and a scale for every 32


def test_profiles_are_those_of_prefill_and_decode(library, monkeypatch, tmp_path):
    """Read back from the build configuration: the plan itself can be opened on a GPU only."""
    seen = {}
    build_it = library.build

    def look(builder, network, config, path, progress=None):
        profiles = {}
        for index in (PREFILL, DECODE):
            profile = recorded[index]
            profiles[index] = {name: [tuple(shape) for shape in profile.get_shape(name)] for name in names(network)}
        seen.update(profiles, count=config.num_optimization_profiles, capability=config.get_compute_capability(0).name)
        return build_it(builder, network, config, path, progress)

    recorded, create = [], library.create_network

    class Recording:
        """The builder, keeping the profiles it makes."""

        def __init__(self, builder):
            self.builder = builder

        def __getattr__(self, name):
            return getattr(self.builder, name)

        def create_optimization_profile(self):
            recorded.append(self.builder.create_optimization_profile())
            return recorded[-1]

    def create_recording():
        builder, network = create()
        return Recording(builder), network

    def names(network):
        return [network.get_input(i).name for i in range(network.num_inputs)]

    monkeypatch.setattr(library, "build", look)
    monkeypatch.setattr(library, "create_network", create_recording)
    build(GOLDEN / "gqa", target("8.9"), library, tmp_path / "model.engine")
    assert seen["count"] == 2 and seen["capability"] == "SM89"
    assert seen[PREFILL]["input_ids"] == [(1, 1), (1, 32), (1, 32)] and seen[PREFILL]["logit_rows"] == [(1,), (1,), (32,)]
    assert seen[DECODE]["input_ids"] == [(1, 1), (4, 1), (4, 1)] and seen[DECODE]["lengths"] == [(1,), (4,), (4,)]
    assert seen[DECODE]["past_key_values.2.value"][2] == (4, 2, 512, 16)


def test_the_library_says_why_it_cannot_build(library, tmp_path):
    """float8 on a card that has none: refused by the library itself, in its own words."""
    with pytest.raises(BuildError, match="refuses to build.*sm86.*fp8"):
        build(GOLDEN / "gqa", target("8.6", "fp8"), library, tmp_path / "model.engine")


@pytest.mark.parametrize("case", ALL_CASES)
def test_the_portable_onnx_graph_goes_through_tensorrts_parser(case, library, tmp_path):
    import onnx_ir as ir

    with open_checkpoint(Golden(case).folder) as checkpoint:
        ops = OnnxPortable(DeployedWeights(Weights(checkpoint)))
        ir.save(ops.finish(define_network(ops)), tmp_path / "model.onnx")
        layers = checkpoint.spec.num_layers
    builder, network = library.create_network()
    parser = library.trt.OnnxParser(network, library.log)
    parsed = parser.parse_from_file(str(tmp_path / "model.onnx"))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert network.num_inputs == 3 + 2 * layers and network.num_outputs == 1 + 2 * layers
    assert network.get_output(0).name == "logits"
    library.check("the parsed graph")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(library.compute_capability("12.0"), 0)
    profile = builder.create_optimization_profile()
    for name, low, high in (("input_ids", 1, 16), ("position_ids", 1, 16), ("attention_mask", 1, 64)):
        profile.set_shape(name, (1, low), (1, high), (2, high))
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name.startswith("past"):
            _, keys, _, size = tensor.shape
            profile.set_shape(tensor.name, (1, keys, 0, size), (1, keys, 16, size), (2, keys, 48, size))
    config.add_optimization_profile(profile)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == library.trt.LayerType.ATTENTION_INPUT:  # no fused kernel in float32, as in our own lowering
            layer.__class__ = library.trt.IAttentionInputLayer
            layer.attention.decomposable = True
    assert library.build(builder, network, config, tmp_path / "model.engine") > 100_000


def test_a_target_writes_an_engine_folder_that_explains_itself(tmp_path):
    told = []
    folder = build_engine(
        GOLDEN / "gqa", "rtx-5090", tmp_path / "engine", precision="int4", progress=lambda *step: told.append(step)
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["graph"] == "model.engine" and manifest["files"]["model.engine"]["bytes"] > 100_000
    assert manifest["target"]["runtime"] == "tensorrt_rtx" and manifest["target"]["precision"] == "int4"
    assert manifest["tools"]["tensorrt_rtx"] == load_library("tensorrt_rtx").version
    assert manifest["flags"]["compute_capability"] == "12.0" and manifest["flags"]["decode_batch"] == 16
    assert manifest["model"]["cache_dtype"] == "float16"
    assert manifest["parity"] is None and "not executed" in manifest["target"]["note"]
    assert not (folder / "genai_config.json").exists()
    done = [part for _, part in told]
    assert any("layers.2.mlp.down" in what for what, _ in told) and max(done) == 1.0


def test_datacenter_targets_name_the_package_they_need(tmp_path):
    with pytest.raises(MissingPackageError, match="needs tensorrt: .*pip install 'tensorrt>=10.14'"):
        build_engine(GOLDEN / "gqa", "h100", tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_datacenter_target_builds_through_stand_ins(tmp_path, monkeypatch):
    """TensorRT-RTX in the place of TensorRT, placeholders in the place of the plugin layers: every line of ours runs, theirs does not."""
    stand_in = load_library("tensorrt_rtx")
    stand_in.name = "tensorrt"
    kinds = stand_in.trt.DataType
    layers = PluginLayers(stand_in.trt, None, {kinds.HALF: "float16", kinds.FLOAT: "float32"})
    monkeypatch.setattr(tensorrt_plugins, "registration", layers)
    monkeypatch.setattr("engines.backends.tensorrt.load_library", lambda name: stand_in)
    folder = build_engine(GOLDEN / "gqa", "h100", tmp_path / "engine")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["target"]["runtime"] == "tensorrt" and manifest["flags"]["form"] == "plugins"
    assert manifest["flags"]["compute_capability"] == "9.0" and "tensorrt" in manifest["tools"]
    assert len(layers.kernels) == 9 and {architecture for _, architecture in layers.kernels} == {90}
    assert {kernel.dtype for kernel, _ in layers.kernels} == {"float16"}


def test_a_precision_the_card_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(TargetError, match="precision of the target a10.*found fp8"):
        build_engine(GOLDEN / "gqa", "a10", tmp_path / "engine", precision="fp8")


@pytest.mark.parametrize("name", target_names())
def test_targets_are_consistent(name):
    chosen = load_target(name)
    assert (chosen.gpu is None) == (chosen.profile is None) == (chosen.runtime == "onnxruntime")
    if chosen.gpu is not None:
        assert (
            chosen.precision.name in chosen.precisions
            and not chosen.executed
            and "not executed" in chosen.note
            or "nor executed" in chosen.note
        )
        assert ("fp8" in chosen.precisions) == (float(chosen.gpu.compute_capability) >= 8.9)
        assert (chosen.form == "plugins") == (chosen.runtime == "tensorrt")
        if chosen.runtime == "tensorrt_rtx":
            load_library("tensorrt_rtx").compute_capability(chosen.gpu.compute_capability)
