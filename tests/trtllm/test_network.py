"""The network against golden data, on a double of TensorRT-LLM's API: packed and padded, chunked, in flight, divided."""

import numpy as np
import pytest
import torch

from export.trtllm.lowering import TensorRTLLM
from export.trtllm.parallel import Parallel
from ngpt.errors import UnsupportedError
from tests.conftest import GOLDEN, Golden
from tests.doubles.tensorrt_llm_double import layers
from tests.trtllm.serving import Engine, converted

LOGIT_ERROR = 2e-5
DIVISIONS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)]


def error(got, want):
    return np.abs(got - want).max()


def engine_of(folder, case, tp=1, pp=1, precision="fp32", **options):
    return Engine(converted(case.folder, folder, Parallel(tp, pp), precision), tp * pp, **options)


@pytest.mark.parametrize(("tp", "pp"), DIVISIONS)
def test_packed_chunked_prefill_and_decode_compute_golden_logits(golden, tp, pp, tmp_path):
    """tp 4 is more than the two key heads of most cases, and pp 3 is one layer a stage."""
    pp = min(pp, 2 if golden.name.startswith("research") else 3)
    engine = engine_of(tmp_path, golden, tp, pp)
    for row, real in enumerate(golden.real):
        ids = golden.ids[row][real][:32]
        got = engine.read(row % engine.slots, ids, chunks=(5, 7, len(ids) - 16))
        assert got.dtype == np.float32
        assert error(got, golden.logits[row][real][:32]) <= LOGIT_ERROR
        engine.lengths = [0] * engine.slots


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (1, 2)])
def test_padded_prefill_and_decode_compute_golden_logits(golden, tp, pp, tmp_path):
    """Rows of different lengths in a contiguous cache; what stands at padded tokens, NaN included, reaches no real one."""
    texts = [golden.ids[0][golden.real[0]][:n] for n in (13, 4)]
    engine = engine_of(tmp_path, golden, tp, pp, packed=False, slots=2)
    got = engine.step([(row, text[:-2], True) for row, text in enumerate(texts)])
    for index in (-2, -1):
        more = engine.step([(row, text[index:][:1], False) for row, text in enumerate(texts)])
        got = [np.concatenate(parts) for parts in zip(got, more, strict=True)]
    for text, logits in zip(texts, got, strict=True):
        assert error(logits, golden.logits[0][golden.real[0]][: len(text)]) <= LOGIT_ERROR


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_requests_in_flight_do_not_see_each_other(tp, pp, tmp_path):
    """Context pieces and single tokens of three sequences in the same steps."""
    case = Golden("gqa")
    engine = engine_of(tmp_path, case, tp, pp)
    a, b = case.ids[0][:16], case.ids[1][:12]
    parts = {0: [], 1: [], 2: []}
    for step in (
        [(0, a[:8], True)],
        [(1, b[:5], True), (0, a[8:9], False)],
        [(2, a[:3], True), (1, b[5:9], True), (0, a[9:10], False)],
        [(2, a[3:7], True), (0, a[10:11], False), (1, b[9:10], False)],
    ):
        for (slot, _, _), logits in zip(step, engine.step(step), strict=True):
            parts[slot].append(logits)
    for slot, row, length in ((0, 0, 11), (1, 1, 10), (2, 0, 7)):
        assert error(np.concatenate(parts[slot]), case.logits[row][:length]) <= LOGIT_ERROR


def test_collectives_are_the_products_own(tmp_path):
    """An all-reduce ends each row-parallel product and the divided embedding; norms add none; the head is gathered once."""
    case = Golden("gqa")
    engine = engine_of(tmp_path, case, tp=2)
    engine.step([(0, case.ids[0][:6], True)])
    size = (6, engine.models[0].spec.hidden_size)
    kinds = [("allreduce", size)] * (1 + 2 * engine.models[0].spec.num_layers)
    for network in engine.networks:
        assert network.collectives == [*kinds, ("allgather", (6, 128))]


def test_stages_pass_hidden_states_on_and_share_no_layers(tmp_path):
    case = Golden("gqa")
    engine = engine_of(tmp_path, case, pp=2)
    engine.step([(0, case.ids[0][:6], True)])
    first, last = (network.collectives for network in engine.networks)
    assert first == [("send", (6, 64))] and last == [("recv", (6, 64))]
    assert "input_ids" in engine.networks[0].inputs and "input_ids" not in engine.networks[1].inputs
    # TensorRT-LLM's own inputs give later stages no positions; this network needs them there.
    assert "position_ids" in engine.networks[1].inputs
    assert [len(model.transformer.layers._modules) for model in engine.models] == [2, 1]


def test_hidden_states_are_unit_norm_on_every_rank(tmp_path):
    case = Golden("gqa")
    engine = engine_of(tmp_path, case, tp=2)
    engine.step([(0, case.ids[0][:9], True)])
    taps = [model._network_outputs for model in engine.models]
    assert list(taps[0]) == ["embed", *(f"layers.{i}.{part}.update" for i in range(3) for part in ("attn", "mlp"))]
    for name in taps[0]:
        states = [t[name].data for t in taps]
        assert torch.equal(*states)
        assert float((states[0].norm(dim=-1) - 1).abs().max()) < 1e-6
    for index in range(3):
        assert error(taps[0][f"layers.{index}.mlp.update"].data.numpy(), case.hidden_states[index + 1][0][:9]) < 2e-6


def norm_before_all_reduce(monkeypatch):
    """The mistake the lowering's docstring warns of: each rank normalises its part of the sum."""

    def collect(self, x):
        length = x.data.norm(dim=-1, keepdim=True)
        x.data = x.data / length
        return layers.functional.allreduce(x, self.tp_group)

    monkeypatch.setattr(layers.RowLinear, "collect_and_bias", collect)


def usual_softmax_scale(monkeypatch):
    real = TensorRTLLM.attention
    monkeypatch.setattr(TensorRTLLM, "attention", lambda self, *a, scale: real(self, *a, scale=1 / scale))


def no_head_norm(monkeypatch):
    real = TensorRTLLM.l2norm
    monkeypatch.setattr(
        TensorRTLLM, "l2norm", lambda self, name, x, eps=0.0: x if name.endswith("_norm") else real(self, name, x, eps)
    )


def bias_on_every_rank(monkeypatch):
    """What adding the whole bias before the all-reduce would do."""

    def collect(self, x):
        return layers.functional.allreduce(x if self.bias is None else x + self.bias.value, self.tp_group)

    monkeypatch.setattr(layers.RowLinear, "collect_and_bias", collect)


@pytest.mark.parametrize("fault", [norm_before_all_reduce, usual_softmax_scale, no_head_norm, bias_on_every_rank])
def test_the_comparison_notices(fault, tmp_path, monkeypatch):
    case = Golden("llama3-rope-bias")
    engine = engine_of(tmp_path, case, tp=2)
    fault(monkeypatch)
    got = engine.step([(0, case.ids[0][:20], True)])[0]
    assert error(got, case.logits[0][:20]) > 100 * LOGIT_ERROR


def test_the_fused_update_is_called_with_what_it_documents(tmp_path, monkeypatch):
    """The call site of the plugin: a stand-in computes what the kernel's docstring says (the kernel has tests of its own)."""
    from export.plugins import registration

    calls = []

    def stand_in(network, h, x, lr, *, eps, architecture):
        network.num_layers += 1
        assert h.shape == x.shape and h.dtype == x.dtype and lr.dtype == torch.float32 and lr.shape == h.shape[-1:]
        calls.append((eps, architecture))
        unit = x.float() / (x.float().norm(dim=-1, keepdim=True) + eps).clamp_min(1e-38)
        moved = h.float() + lr * (unit - h.float())
        return (moved / moved.norm(dim=-1, keepdim=True)).to(h.dtype)

    monkeypatch.setattr(registration, "hypersphere_update", stand_in)
    case = Golden("gqa")
    engine = Engine(converted(case.folder, tmp_path, Parallel(2), kernels=90), 2)
    got = engine.step([(0, case.ids[0][:9], True)])[0]
    assert error(got, case.logits[0][:9]) <= LOGIT_ERROR
    assert sorted(calls) == sorted([(0.0, 90), (1e-6, 90)] * 3 * 2)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_half_precision_is_as_close_to_golden_as_pytorch_in_the_same_type(hf_case, precision, tp, tmp_path):
    """The measure is what PyTorch itself loses in this type; all-reduces add in it too."""
    from ngpt import NGPTForCausalLM

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    model = NGPTForCausalLM.from_pretrained(hf_case.folder, dtype=dtype, attn_implementation="eager")
    engine = engine_of(tmp_path, hf_case, tp, precision=precision)
    ours, theirs = [], []
    with torch.no_grad():
        for row, real in enumerate(hf_case.real):
            ids, want = hf_case.ids[row][real], hf_case.logits[row][real]
            ours.append(engine.step([(row, ids, True)])[0] - want)
            theirs.append(model(torch.from_numpy(ids)[None]).logits[0].double().numpy() - want)
    ours, theirs = (np.sqrt(np.mean(np.concatenate(e) ** 2)) for e in (ours, theirs))
    assert 0 < ours <= 2 * theirs


def test_inputs_that_the_network_does_not_take_are_refused_by_name(tmp_path):
    model = Engine(converted(GOLDEN / "gqa", tmp_path)).models[0]
    with pytest.raises(UnsupportedError, match="lora_params"):
        model.forward(lora_params=object())
