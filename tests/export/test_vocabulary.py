"""The vocabulary means the same in every lowering: coarse operations, fused and composed, and whole networks.

Each bench runs operations of one lowering on arrays, with heads as [B, S, heads, D]; the truth is the vocabulary in
NumPy float64.
"""

import ast
import inspect
from contextlib import ExitStack
from functools import partial

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from export.lowerings.base import Lowering
from export.lowerings.onnx import OnnxPortable, OnnxRuntime
from export.lowerings.tensorrt import plugins as tensorrt_plugins
from export.lowerings.tensorrt.library import load_library
from export.lowerings.tensorrt.native import TensorRT
from export.lowerings.tensorrt.plugins import TensorRTPlugins
from export.lowerings.tensorrt.weights_file import WeightsFile
from export.network import define_network
from export.plugins.kernels import HypersphereUpdate, QKNorm
from export.precision import TENSORRT
from export.trtllm.lowering import Inputs, TensorRTLLM
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import UnsupportedError
from ngpt.weights import Weights
from tests.conftest import ALL_CASES, GOLDEN, ROOT, Golden
from tests.doubles.emulator import Emulator
from tests.doubles.numpy_lowering import NumpyLowering
from tests.doubles.plugin_layers import PluginLayers
from tests.doubles.tensorrt_evaluator import Evaluator
from tests.doubles.tensorrt_llm_double import functional
from tests.doubles.tensorrt_llm_double.tensor import made
from tests.export.tensorrt_network import OLD_FEATURES, Network
from tests.export.test_onnx import export, feeds, session
from tests.trtllm.serving import Engine, converted

LOGIT_ERROR = 2e-5
NOISE = 1e-6  # float32 against float64, of numbers of size 1: three times what the worst bench was seen to have
EPS = 1e-6
CASES = ["gqa", "llama3-rope-bias", "research-checkpoint"]
ROWS, TOKENS = 2, 5


def inputs_of(operation, spec):
    """Arrays float32 that an operation takes, heads side by side. Branches of any length, and of none, go into an update."""
    rng = np.random.default_rng(3)

    def random(width):
        return rng.standard_normal((ROWS, TOKENS, width)).astype(np.float32)

    h = random(spec.hidden_size)
    h /= np.linalg.norm(h, axis=-1, keepdims=True)
    if operation == "queries_keys_values":
        return [h]
    if operation == "qk_norm":
        return [random(heads * spec.head_dim) for heads in (spec.num_heads, spec.num_kv_heads)]
    return [h, random(spec.hidden_size) * np.array([0, 1e-6, 1e-3, 1, 1e6], np.float32)[:, None]]


def apply(ops, operation, composed, inputs):
    """The operation's results as the lowering's own handles: its own form, or that of the base class."""
    function = partial(getattr(Lowering, operation), ops) if composed else getattr(ops, operation)
    if operation == "queries_keys_values":
        return function("layers.1.attn", *inputs)
    if operation == "qk_norm":
        q, k = inputs
        q, k = ops.split_heads("q.heads", q, ops.spec.num_heads), ops.split_heads("k.heads", k, ops.spec.num_kv_heads)
        return function("layers.1.attn", q, k)
    return (function("layers.1.attn.update", *inputs, rate="layers.1.attn.lr", eps=EPS),)


OPERATIONS = ("queries_keys_values", "qk_norm", "hypersphere_update")
POSITIONS = np.tile(np.arange(TOKENS), (ROWS, 1))


def in_numpy(weights, operation, inputs):
    ops = NumpyLowering(weights, POSITIONS)
    return apply(ops, operation, False, [x.astype(np.float64) for x in inputs])


def in_onnx(lowering, weights, operation, composed, inputs):
    ops = lowering(weights)
    ops.nodes.clear()  # the masks
    values = [
        ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape)) for i, x in enumerate(inputs)
    ]
    results = apply(ops, operation, composed, values)
    for result in results:
        result.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [*values, ops.position_ids],
        results,
        nodes=ops.nodes,
        initializers=list(ops.initializers.values()),
        opset_imports=ops.opsets(),
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    run = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return run.run(None, {f"x{i}": x for i, x in enumerate(inputs)} | {"position_ids": POSITIONS})


def in_tensorrt(lowering, weights, operation, composed, inputs, instead=None):
    library, spec = load_library("tensorrt_rtx"), weights.spec
    _, network = library.create_network()
    with WeightsFile() as scratch:
        ops = lowering(weights, library, network, scratch, TENSORRT["fp32"])
        values = [ops.input(f"x{i}", ops.float32, (-1, -1, x.shape[-1])) for i, x in enumerate(inputs)]
        results = apply(ops, operation, composed, values)
        for result in results:
            network.mark_output(result)
        given = {f"x{i}": x for i, x in enumerate(inputs)} | {"input_ids": POSITIONS, "position_ids": POSITIONS}
        given |= {"write_at": np.zeros(ROWS), "lengths": np.full(ROWS, TOKENS), "logit_rows": [0]}
        cache = np.zeros((ROWS, spec.num_kv_heads, spec.max_length, spec.head_dim), np.float32)
        given |= {f"past_key_values.{i}.{kind}": cache for i in range(spec.num_layers) for kind in ("key", "value")}
        got = Evaluator(library.trt, network, instead)(given)
    arrays = [got[result.name] for result in results]
    return [x.swapaxes(1, 2) if x.ndim == 4 else x for x in arrays]  # heads stand before tokens here


def in_tensorrt_llm(model, operation, composed, inputs, packed):
    positions = torch.from_numpy(POSITIONS).int()
    tensors = [torch.from_numpy(x) for x in inputs]
    if packed:
        positions, tensors = positions.flatten(), [x.flatten(0, 1) for x in tensors]
    given = Inputs(None, made(positions), None, None, False, None, None, packed=packed, paged=False)
    results = apply(TensorRTLLM(functional, model, given), operation, composed, [made(x) for x in tensors])
    return [x.data.reshape(ROWS, TOKENS, *x.shape[1 if packed else 2 :]).numpy() for x in results]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    wanted = []
    for case in ALL_CASES:
        with open_checkpoint(GOLDEN / case) as checkpoint:
            spec = checkpoint.spec
        wanted += [HypersphereUpdate(spec.hidden_size, eps, "float32") for eps in (0.0, EPS, spec.mlp_eps)]
        if spec.position == "rope":
            wanted.append(QKNorm(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim, "float32"))
    return Emulator(wanted, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def plugins(emulator, monkeypatch):
    """What stands for the plugins' layers in a network: its `results`."""
    library = load_library("tensorrt_rtx")
    layers = PluginLayers(library.trt, emulator.launch, {library.trt.DataType.FLOAT: "float32"})
    monkeypatch.setattr(tensorrt_plugins, "registration", layers)
    return layers


RUNTIMES = [
    "onnx-portable",
    "onnx-runtime",
    "tensorrt",
    "tensorrt-old",
    "tensorrt-plugins",
    "tensorrt-llm",
    "tensorrt-llm-padded",
]


@pytest.fixture(params=RUNTIMES)
def bench(request, tmp_path):
    """`bench(case)(operation, composed, inputs)` is the operation's results as arrays."""
    name = request.param
    with ExitStack() as open_files:

        def of(case):
            if name.startswith("tensorrt-llm"):
                model = Engine(converted(GOLDEN / case, tmp_path)).models[0]
                return partial(in_tensorrt_llm, model, packed=not name.endswith("padded"))
            weights = DeployedWeights(Weights(open_files.enter_context(open_checkpoint(GOLDEN / case))))
            if name.startswith("onnx"):
                return partial(in_onnx, OnnxPortable if name == "onnx-portable" else OnnxRuntime, weights)
            if name == "tensorrt-plugins":
                return partial(in_tensorrt, TensorRTPlugins, weights, instead=request.getfixturevalue("plugins").results)
            if name == "tensorrt-old":
                request.getfixturevalue("old_library")
            return partial(in_tensorrt, TensorRT, weights)

        yield of


@pytest.fixture
def old_library(monkeypatch):
    """A library without the layers that older versions lack."""
    module = "export.lowerings.tensorrt.library.Library.__init__"
    real = load_library("tensorrt_rtx").__class__.__init__

    def init(self, trt):
        real(self, trt)
        vars(self).update(dict.fromkeys(OLD_FEATURES, False))

    monkeypatch.setattr(module, init)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_the_composed_and_the_fused_form_of_an_operation_say_what_numpy_says(bench, case, operation):
    with open_checkpoint(GOLDEN / case) as checkpoint:
        weights = DeployedWeights(Weights(checkpoint))
        inputs = inputs_of(operation, weights.spec)
        truth = in_numpy(weights, operation, inputs)
    run = bench(case)
    forms = [run(operation, composed, inputs) for composed in (True, False)]
    assert len(truth) == len(forms[0]) == len(forms[1])
    for wanted, composed, fused in zip(truth, *forms, strict=True):
        size = np.abs(wanted).max()
        assert wanted.shape == composed.shape == fused.shape
        assert np.abs(composed - wanted).max() <= NOISE * size
        assert np.abs(fused - wanted).max() <= NOISE * size
        assert np.abs(fused - composed).max() <= NOISE * size


def test_every_coarse_operation_is_tested_here():
    """Coarse is what the base class composes itself."""
    made = {name for name, member in vars(Lowering).items() if inspect.isfunction(member) and not name.startswith("_")}
    assert made - Lowering.__abstractmethods__ == set(OPERATIONS)


def composed_of(lowering):
    """The lowering without any fused form."""
    return type(f"Composed{lowering.__name__}", (lowering,), {name: vars(Lowering)[name] for name in OPERATIONS})


def test_numpy_computes_golden_logits_through_the_same_statement_of_the_network(golden):
    with open_checkpoint(golden.folder) as checkpoint:
        weights = DeployedWeights(Weights(checkpoint))
        for row, real in enumerate(golden.real):
            got = define_network(NumpyLowering(weights, golden.ids[row][real][None]))
            assert np.abs(got[0] - golden.logits[row][real]).max() <= 5e-6


@pytest.mark.parametrize("lowering", [OnnxPortable, OnnxRuntime])
def test_an_onnx_graph_of_composed_operations_computes_golden_logits(golden, lowering, tmp_path):
    spec = export(golden, composed_of(lowering), tmp_path / "m.onnx")
    run = session(tmp_path / "m.onnx")
    for row, real in enumerate(golden.real):
        ids = golden.ids[row][real][None]
        got = run.run(["logits"], feeds(spec, ids, np.ones_like(ids)))[0][0]
        assert np.abs(got - golden.logits[row][real]).max() <= LOGIT_ERROR


@pytest.mark.parametrize("lowering", [TensorRT, TensorRTPlugins])
def test_a_tensorrt_network_of_composed_operations_computes_golden_logits(golden, lowering):
    with Network(golden.folder, load_library("tensorrt_rtx"), lowering=composed_of(lowering)) as net:
        for row, real in enumerate(golden.real):
            assert np.abs(net.run(golden.ids[row][real])["logits"] - golden.logits[row][real]).max() <= LOGIT_ERROR


@pytest.mark.parametrize("packed", [True, False])
def test_a_tensorrt_llm_network_of_composed_operations_computes_golden_logits(golden, packed, tmp_path, monkeypatch):
    for name in OPERATIONS:
        monkeypatch.setattr(TensorRTLLM, name, vars(Lowering)[name])
    engine = Engine(converted(golden.folder, tmp_path), packed=packed, slots=1)
    ids = golden.ids[0][golden.real[0]][:20]
    assert np.abs(engine.read(0, ids, chunks=(18,)) - golden.logits[0][golden.real[0]][:20]).max() <= LOGIT_ERROR


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_composed_operations_take_the_types_that_a_network_in_half_precision_has(precision, tmp_path, monkeypatch):
    """Types that do not fit are refused by TensorRT-RTX, by ONNX Runtime and by the double of TensorRT-LLM alike."""
    case = Golden("gqa")
    with Network(case.folder, load_library("tensorrt_rtx"), precision, lowering=composed_of(TensorRT)) as net:
        assert np.abs(net.run(case.ids[0][:9])["logits"] - case.logits[0][:9]).max() < 0.3
    if precision == "fp16":
        spec = export(case, composed_of(OnnxRuntime), tmp_path / "m.onnx", precision)
        given = feeds(spec, case.ids[:1, :9], np.ones((1, 9), np.int64))
        given = {name: x.astype(np.float16) if name.startswith("past") else x for name, x in given.items()}
        got = session(tmp_path / "m.onnx").run(["logits"], given)[0]
        assert np.abs(got[0] - case.logits[0][:9]).max() < 0.3
    for name in OPERATIONS:
        monkeypatch.setattr(TensorRTLLM, name, vars(Lowering)[name])
    (tmp_path / "converted").mkdir()
    engine = Engine(converted(case.folder, tmp_path / "converted", precision=precision))
    assert np.abs(engine.read(0, case.ids[0][:9], chunks=(9,)) - case.logits[0][:9]).max() < 0.3


@pytest.mark.parametrize("runtime", ["onnx", "tensorrt", "tensorrt-llm"])
def test_an_unknown_activation_is_refused_by_name(runtime, tmp_path):
    with open_checkpoint(GOLDEN / "gqa") as checkpoint, WeightsFile() as scratch:
        weights = DeployedWeights(Weights(checkpoint))
        if runtime == "onnx":
            ops = OnnxRuntime(weights)
        elif runtime == "tensorrt":
            library = load_library("tensorrt_rtx")
            ops = TensorRT(weights, library, library.create_network()[1], scratch, TENSORRT["fp32"])
        else:
            given = Inputs(None, None, None, None, False, None, None, packed=True, paged=False)
            ops = TensorRTLLM(functional, Engine(converted(GOLDEN / "gqa", tmp_path)).models[0], given)
        with pytest.raises(UnsupportedError, match="activation in .*relu2.*found mish"):
            ops.activation("layers.0.mlp.act", "mish", None)


def imports(path):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_the_network_and_the_lowerings_do_not_import_each_other():
    assert [name for name in imports(ROOT / "export" / "network.py") if name.startswith("export")] == ["export.lowerings.base"]
    lowerings = sorted((ROOT / "export" / "lowerings").rglob("*.py"))
    assert len(lowerings) > 5
    for path in lowerings:
        assert "export.network" not in set(imports(path)), path
