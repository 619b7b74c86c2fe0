"""Both ONNX forms against golden data: in ONNX Runtime, and the portable one in OpenVINO unchanged."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from export.lowerings.onnx import OnnxPortable, OnnxRuntime
from export.network import define_network
from export.precision import ONNX_RUNTIME
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights

LOGIT_ERROR = 2e-5


def export(case, lowering, path, precision="fp32", taps=()):
    with open_checkpoint(case.folder) as checkpoint:
        weights = DeployedWeights(Weights(checkpoint), arithmetic=ONNX_RUNTIME[precision].arithmetic)
        ops = lowering(weights, ONNX_RUNTIME[precision])
        ir.save(ops.finish(define_network(ops), taps), path)
        return checkpoint.spec


def session(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(spec, ids, mask, past=None, channels=None):
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    empty = np.zeros((len(ids), spec.num_kv_heads, 0, channels or spec.head_dim), np.float32)
    names = [f"past_key_values.{i}.{kind}" for i in range(spec.num_layers) for kind in ("key", "value")]
    return dict(zip(names, past or [empty] * len(names), strict=True), input_ids=ids, attention_mask=mask, position_ids=positions)


def test_portable_matches_golden_and_passes_the_full_check(golden, tmp_path):
    path = tmp_path / "m.onnx"
    spec = export(golden, OnnxPortable, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    logits = session(path).run(["logits"], feeds(spec, golden.ids, golden.mask))[0]
    assert np.isfinite(logits).all()  # padded positions included
    assert np.abs(logits - golden.logits)[golden.real].max() <= LOGIT_ERROR


def test_portable_runs_in_openvino_unchanged(golden, tmp_path):
    import openvino

    path = tmp_path / "m.onnx"
    spec = export(golden, OnnxPortable, path)
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits = compiled(feeds(spec, golden.ids, golden.mask))["logits"]
    assert np.abs(logits - golden.logits)[golden.real].max() <= LOGIT_ERROR


def test_fused_matches_golden(golden, tmp_path):
    """Row by row without padding, as the runner feeds it: the fused graph needs no left padding."""
    path = tmp_path / "m.onnx"
    spec = export(golden, OnnxRuntime, path)
    run = session(path)
    for row, real, expected in zip(golden.ids, golden.real, golden.logits, strict=True):
        ids = row[real][None]
        logits = run.run(["logits"], feeds(spec, ids, np.ones_like(ids)))[0][0]
        assert np.abs(logits - expected[real]).max() <= LOGIT_ERROR


def greedy(run, spec, ids, mask, steps):
    """The greedy continuation [B, steps] of a loop such as other tools have: the cache grows, the mask gets a column a step."""
    past, tokens = None, []
    for _ in range(steps):
        logits, *past = run(feeds(spec, ids, mask, past))
        ids, mask = logits[:, -1].argmax(-1)[:, None], np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        tokens.append(ids)
    return np.concatenate(tokens, axis=1)


def test_a_left_padded_batch_decodes_to_the_golden_tokens_in_openvino_and_onnx_runtime(tmp_path):
    import openvino

    from tests.conftest import Golden

    case = Golden("gqa-left-padded")
    spec = export(case, OnnxPortable, tmp_path / "m.onnx")
    compiled = openvino.Core().compile_model(str(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run, wanted = session(tmp_path / "m.onnx"), case.greedy[:, case.ids.shape[1] :]
    for tool in (lambda x: list(compiled(x).values()), lambda x: run.run(None, x)):
        np.testing.assert_array_equal(greedy(tool, spec, case.ids, case.mask, wanted.shape[1]), wanted)


FIRST_CALLS = {
    "padding on the left": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
    "one place on the left": [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
    "a hole": [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]],
    "padding on both sides": [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    "a row without tokens": [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]],
    "one sequence, padding on the left": [[0, 1, 1, 1, 1]],
}


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    from tests.conftest import Golden

    case, path = Golden("gqa"), tmp_path_factory.mktemp("fused") / "m.onnx"
    spec = export(case, OnnxRuntime, path)
    return case, spec, session(path)


@pytest.mark.parametrize("name", FIRST_CALLS)
def test_the_fused_attention_stops_at_padding_it_would_attend_to(fused, name):
    case, spec, run = fused
    mask = np.array(FIRST_CALLS[name])
    with pytest.raises(Exception, match="attention_mask: the fused attention takes padding on the right alone; onnx-portable"):
        run.run(["logits"], feeds(spec, case.ids[:1, :5].repeat(len(mask), 0), mask))


def test_the_fused_graph_takes_padding_on_the_right_and_decodes_past_it(fused):
    """As onnxruntime-genai feeds a batch: the padding stays in the mask as a hole, and a row's length is what it sums to."""
    case, spec, run = fused
    ids, lengths = case.ids[0], (9, 4)
    batch, mask = np.zeros((2, 9), np.int64), np.zeros((2, 9), np.int64)
    for row, length in enumerate(lengths):
        batch[row, :length], mask[row, :length] = ids[:length], 1
    logits, *past = run.run(None, feeds(spec, batch, mask))
    for row, length in enumerate(lengths):
        assert np.abs(logits[row, :length] - case.logits[0, :length]).max() <= LOGIT_ERROR
    for step in range(3):
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        new = np.array([[ids[length + step]] for length in lengths])
        logits, *past = run.run(None, feeds(spec, new, mask, past))
        expected = case.logits[0, [length + step for length in lengths]]
        assert np.abs(logits[:, 0] - expected).max() <= LOGIT_ERROR


@pytest.mark.parametrize("lowering", [OnnxPortable, OnnxRuntime])
def test_axes_have_the_names_that_other_tools_resolve(lowering, tmp_path):
    """transformers.js fills `batch_size` in and takes any other name for 0; optimum adds up what an axis is named."""
    from tests.conftest import Golden

    export(Golden("gqa"), lowering, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}
    assert axes["input_ids"] == axes["position_ids"] == ["batch_size", "sequence_length"]
    assert axes["attention_mask"] == ["batch_size", "past_sequence_length + sequence_length"]
    assert axes["past_key_values.2.value"] == ["batch_size", 2, "past_sequence_length", 16]
    assert axes["logits"] == ["batch_size", "sequence_length", 256]
    present = "present_sequence_length" if lowering is OnnxRuntime else "past_sequence_length + sequence_length"
    assert axes["present.2.value"] == ["batch_size", 2, present, 16]


@pytest.mark.parametrize("lowering", [OnnxPortable, OnnxRuntime])
def test_every_layers_hidden_state_matches_golden_by_name(lowering, tmp_path):
    from tests.conftest import Golden

    case = Golden("gqa")
    names = ["embed", *(f"layers.{i}.mlp.update" for i in range(3))]
    spec = export(case, lowering, tmp_path / "m.onnx", taps=names)
    states = session(tmp_path / "m.onnx").run(names, feeds(spec, case.ids, case.mask))
    assert np.abs(np.stack(states) - case.hidden_states).max() <= 2e-6


def test_fused_and_composed_updates_agree_on_zero_tiny_and_huge_branches():
    """hypersphere_update fused for ONNX Runtime says what the composed one says, at any length of the branch's output."""
    from types import SimpleNamespace

    rng, size = np.random.default_rng(0), 48
    rate = np.abs(rng.standard_normal(size)).astype(np.float32) * 0.3
    rows = rng.standard_normal((6, size)).astype(np.float32)
    h = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    x = rng.standard_normal((6, size)).astype(np.float32) * np.array([0, 1e-9, 1e-6, 1e-3, 1, 1e6], np.float32)[:, None]
    spec = SimpleNamespace(hidden_size=size, num_layers=0, num_kv_heads=1, head_dim=8, vocab_size=9)
    weights = SimpleNamespace(spec=spec, get=lambda name: rate, shape=lambda name: (size,))
    wide = x.astype(np.float64)
    for eps in (0.0, 1e-6):
        length = np.linalg.norm(wide, axis=1, keepdims=True) + eps
        unit = np.divide(wide, length, out=np.zeros_like(wide), where=length > 0)
        moved = h + rate * (unit - h)
        expected = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        for lowering in (OnnxPortable, OnnxRuntime):
            ops = lowering(weights)
            values = [ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([6, size])) for n in "hx"]
            ops.nodes.clear()
            out = ops.hypersphere_update("out", *values, rate="lr", eps=eps)
            out.type = ir.TensorType(ir.DataType.FLOAT)
            graph = ir.Graph(
                values, [out], nodes=ops.nodes, initializers=list(ops.initializers.values()), opset_imports=ops.opsets()
            )
            model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
            got = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"h": h, "x": x})[0]
            assert np.abs(got - expected).max() <= 5e-7, (lowering.__name__, eps)


def test_fp16_graph_builds_with_the_branch_scaled_inside_half_precision(tmp_path):
    """cuda-fp16 cannot run here; its graph is built, checked for dtypes, and its folded branch stays in range."""
    from tests.conftest import Golden

    case = Golden("gqa")
    export(case, OnnxRuntime, tmp_path / "m.onnx", "fp16")
    model = onnx.load(tmp_path / "m.onnx")
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds["layers.0.attn.qkv.weight"] == onnx.TensorProto.FLOAT16
    past = next(i for i in model.graph.input if i.name == "past_key_values.0.key")
    assert past.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    with open_checkpoint(case.folder) as checkpoint:
        plain = DeployedWeights(Weights(checkpoint))
        half = DeployedWeights(Weights(checkpoint), arithmetic="float16")
        np.testing.assert_allclose(half.get("layers.0.mlp.up.weight"), plain.get("layers.0.mlp.up.weight") * 64**-0.25, rtol=1e-6)
        assert half.mlp_eps == pytest.approx(plain.mlp_eps * 64**-0.5)


def test_the_float16_graph_is_as_close_to_golden_as_pytorch_in_float16(hf_case, tmp_path):
    """The graph of the target cuda-fp16, run by ONNX Runtime's CPU kernels: its numerics, not its CUDA execution."""
    import torch

    from ngpt import NGPTForCausalLM

    spec = export(hf_case, OnnxRuntime, tmp_path / "m.onnx", "fp16")
    run = session(tmp_path / "m.onnx")
    model = NGPTForCausalLM.from_pretrained(hf_case.folder, dtype=torch.float16, attn_implementation="eager")
    ours, theirs = [], []
    for row, real, expected in zip(hf_case.ids, hf_case.real, hf_case.logits, strict=True):
        ids = row[real][None]
        inputs = {k: v.astype(np.float16) if k.startswith("past") else v for k, v in feeds(spec, ids, np.ones_like(ids)).items()}
        ours.append(run.run(["logits"], inputs)[0][0] - expected[real])
        with torch.no_grad():
            theirs.append(model(torch.from_numpy(ids)).logits[0].double().numpy() - expected[real])
    ours, theirs = (float(np.sqrt(np.mean(np.concatenate(e) ** 2))) for e in (ours, theirs))
    assert 0 < ours <= 2 * theirs
