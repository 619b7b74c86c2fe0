"""The parity gate: faithful engines pass, and every engine that is wrong in one respect fails."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from engines.parity import ParityReport, Quantization, TokenSequence, verify
from engines.parity.compare import distance
from engines.parity.gate import Check, Measured, checks
from engines.parity.quantized import quantization_of, round_to_int8
from engines.parity.report import SequenceResult
from export.precision import ONNX_RUNTIME, Format
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import ConfigError, EngineError, TargetError
from ngpt.weights import Weights
from tests.doubles.reference import Reference
from tests.doubles.reference_runner import ReferenceRunner
from tests.doubles.torch_reference import put_quantized_weights, quantize_activations
from tests.doubles.torch_runner import FAULTS as TORCH_FAULTS
from tests.doubles.torch_runner import TorchRunner
from tests.ngpt.making import GOLDEN

STEPS = 12  # of decode: a fault of the network shows at once; the full 64 run below, on the double with a cache


def weights(name="gqa"):
    return Weights(open_checkpoint(GOLDEN / name))


def engine(*faults, name="gqa", late=False, **options):
    return ReferenceRunner(Reference(weights(name), faults, dtype=np.float32, **options), late=late)


def quantized(*faults, bits, rounding=None):
    """A double of an engine with quantised weights (head at 8 bits, embedding in float16) and activations."""

    def replace(name, matrix):
        if name == "embed":
            return matrix.astype(np.float16)
        if rounding is not None:
            return rounding("lm_head" if name.startswith("head") else name, matrix)
        return ONNX_RUNTIME[f"int{bits}"].format_of(name).round_trip(matrix)

    return engine(
        *faults,
        replace=replace,
        round_input=lambda x: round_to_int8(torch.from_numpy(np.ascontiguousarray(x)), 32).numpy(),
    )


def check(runner, name="gqa", taps=True, steps=STEPS, **options):
    taps = runner.taps if taps else None
    return verify(runner, GOLDEN / name, decode_steps=steps, taps=taps, **options)


@pytest.mark.parametrize("name", ["gqa", "llama3-rope-bias", "dead-mlp", "research-checkpoint"])
def test_a_faithful_float32_engine_passes(name):
    report = check(engine(name=name), name)
    assert report.verdict == "pass", report.failures
    assert report.summary["reference"] == "PyTorch float64"
    assert report.summary["top1_agreement"] == 1.0 and report.summary["taps"] == 7
    # The limits are tight: noise is some 1e-6, and nothing was given away by a generous floor.
    assert max(c.limit for c in report.checks if "logit error" in c.name) < 1e-4


@pytest.mark.parametrize("name", ["gqa", "llama3-rope-bias", "dead-mlp"])
def test_a_faithful_engine_with_a_cache_passes_64_decode_steps(name):
    runner = TorchRunner(GOLDEN / name)
    report = verify(runner, GOLDEN / name)
    assert report.verdict == "pass", report.failures
    assert report.summary["decode_steps"] == 64 and runner.caches == {}


@pytest.mark.parametrize("fault", TORCH_FAULTS)
def test_a_broken_engine_with_a_cache_fails(fault):
    report = verify(TorchRunner(GOLDEN / "gqa", fault), GOLDEN / "gqa", decode_steps=STEPS)
    assert report.verdict == "fail"
    if fault == "late_decode":
        assert {check.name.split(":")[0] for check in report.failures if ":" in check.name} == {"decode"}


FAULTS = ["inverse_scale", "swapped_head", "signed_alpha", "skipped_layer", "unsquared_sqk"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_engine_fails_by_its_logits_alone(fault):
    assert check(engine(fault), taps=False).verdict == "fail"


def test_the_first_layer_that_parts_ways_is_named():
    assert check(engine("swapped_head")).summary["first_divergence"] == "layers.1.attn.update"
    assert check(engine()).summary["first_divergence"] is None


def test_a_fault_of_decode_alone_fails_and_prefill_is_not_blamed():
    report = check(engine(late=True), taps=False)
    assert report.verdict == "fail"
    assert {check.name.split(":")[0] for check in report.failures if ":" in check.name} == {"decode"}


class Wrapped(ReferenceRunner):
    """The faithful double, with one change to its logits."""

    def __init__(self, change):
        super().__init__(Reference(weights(), dtype=np.float32))
        self.change = change
        self.calls = 0

    def decode(self, slots, tokens):
        self.calls += 1
        return self.change(super().decode(slots, tokens), self.calls)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, _call: logits * np.float32(1.0001),
        lambda logits, call: logits + (call == 5) * 1e-3 * np.eye(*logits.shape, dtype=np.float32),
        lambda logits, call: np.where(call == 7, np.nan, logits),
        lambda logits, _call: logits.astype(np.float16).astype(np.float32),
    ],
    ids=["scaled by 1e-4", "one logit of one step", "NaN once", "rounded to float16"],
)
def test_small_and_rare_faults_fail(change):
    report = verify(Wrapped(change), GOLDEN / "gqa", decode_steps=STEPS)
    assert report.verdict == "fail"


def test_the_same_float16_rounding_passes_for_a_float16_engine():
    runner = Wrapped(lambda logits, _call: logits.astype(np.float16).astype(np.float32))
    assert verify(runner, GOLDEN / "gqa", decode_steps=STEPS, precision="fp16").verdict == "pass"


@pytest.mark.parametrize("precision, bits", [("int8", 8), ("int4", 4)])
def test_a_faithful_quantised_engine_passes_and_its_loss_is_reported(precision, bits):
    report = check(quantized(bits=bits), precision=precision)
    assert report.verdict == "pass", report.failures
    loss = report.summary["quantization_loss"]
    assert 0 < loss["kl_mean"] < 0.1 and loss["perplexity_original"] > 1
    assert "same quantised weights" in report.summary["reference"]
    bound = next(c for c in report.checks if c.name.startswith("quantisation loss"))
    # Rounding to nearest costs what random errors of one step cost: the bound is not idle.
    assert 0.5 < bound.measured / bound.noise < 1.5


def test_a_quantised_torch_engine_with_a_cache_passes():
    scheme = quantization_of(ONNX_RUNTIME["int4"])

    def prepare(model):
        put_quantized_weights(model, scheme)
        quantize_activations(model, scheme)

    report = verify(TorchRunner(GOLDEN / "gqa", prepare=prepare), GOLDEN / "gqa", precision="int4", decode_steps=STEPS)
    assert report.verdict == "pass", report.failures


def test_weights_of_fewer_bits_than_the_format_has_fail_by_their_loss():
    def coarse(name, matrix):
        return Format("int4", 32).round_trip(matrix)

    scheme = Quantization(8, 32, coarse, head_bits=8, narrow_embedding=True, activation_block=32)
    report = check(quantized(bits=4, rounding=coarse), quantization=scheme, precision="int8", taps=False)
    assert "quantisation loss: sqrt(KL), mean" in {c.name for c in report.failures}


def test_a_yardstick_that_overflows_is_named():
    names = {c.name: c.passed for c in check(engine(), taps=False).checks}
    assert names["the noise, PyTorch in this precision, is finite"] is True
    good = distance(np.eye(2), np.eye(2), (0, 1))
    bad = distance(np.eye(2), np.full((2, 2), np.inf), (0, 1))
    sequence = TokenSequence("s", (0, 1), 1, is_text=False)
    failed = {c.name for c in checks(Measured([sequence], [good], [bad], 1.0, "float16")) if not c.passed}
    assert "the noise, PyTorch in this precision, is finite" in failed and "every output is finite" not in failed


@pytest.mark.parametrize("precision, bits", [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_quantised_engine_fails(fault, precision, bits):
    assert check(quantized(fault, bits=bits), precision=precision, taps=False).verdict == "fail"


def test_an_engine_with_fewer_bits_than_it_claims_fails():
    assert check(quantized(bits=4), precision="int8").verdict == "fail"
    assert check(quantized(bits=8), precision="fp32").verdict == "fail"


def test_a_quantiser_that_rounds_badly_cannot_hide_behind_itself():
    def rounds_down(name, matrix):
        step = np.abs(matrix).max(-1, keepdims=True) / 2 ** ((8 if name == "lm_head" else 4) - 1)
        return (np.floor(matrix / step) * step).astype(np.float32)

    scheme = Quantization(4, 32, rounds_down, head_bits=8, narrow_embedding=True, activation_block=32)
    report = check(quantized(bits=4, rounding=rounds_down), quantization=scheme, precision="int4")
    assert report.verdict == "fail"
    # Engine and reference agree, since both used the same rounding: the audit of the weights alone finds it.
    names = {check.name.split(",")[0] for check in report.failures}
    assert "quantised weights" in names and names <= {"quantised weights", "quantisation loss: sqrt(KL)"}


def test_a_reference_that_does_not_fit_in_float64_is_float32_and_says_so():
    report = check(engine(), float64_limit_bytes=0)
    assert report.verdict == "pass", report.failures
    assert report.summary["reference"] == "PyTorch float32"
    assert "another attention kernel" in report.summary["noise"]
    assert check(engine("swapped_head"), float64_limit_bytes=0).verdict == "fail"


def test_batches_are_ragged_and_slots_are_given_back():
    runner = engine()
    report = check(runner, taps=False)
    assert runner.most_open == 2 and runner.slots == {}
    assert len({sequence.prompt_length for sequence in report.sequences}) > 1


def test_given_prompts_are_continued_by_the_models_own_choice():
    report = check(engine(), taps=False, prompts=[[5, 6, 7], [8]])
    assert [sequence.prompt_length for sequence in report.sequences] == [3, 1]
    assert report.summary["positions"] == 4 + 2 * STEPS
    greedy = np.load(GOLDEN / "gqa" / "golden.npz")
    from tests.doubles.torch_reference import TorchReference

    model = TorchReference(GOLDEN / "gqa", "float64")
    length = greedy["input_ids"].shape[1]
    assert model.continue_greedily(greedy["input_ids"][0].tolist(), 24) == greedy["greedy"][0, length:].tolist()


def test_report_files(tmp_path):
    report = check(engine("swapped_head"))
    json_file, html_file = report.write(tmp_path / "out")
    data = json.loads(json_file.read_text())
    assert data["verdict"] == "fail" and data["summary"]["failed_checks"]
    assert len(data["sequences"][0]["kl"]) == data["sequences"][0]["prompt_length"] + STEPS
    page = html_file.read_text()
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    assert "FAIL" in page and page.count("<svg") > len(data["sequences"])
    assert "<script" not in page and "src=" not in page, "the page is self-contained"
    assert page.count("href=") == page.count('href="#'), "links lead to places of the page itself"
    assert [path.name for path in sorted(tmp_path.joinpath("out").iterdir())] == [
        "parity.html",
        "parity.json",
    ]


def test_the_page_escapes_every_name_that_came_from_outside():
    bad = "<script>alert('x')</script>"
    check = Check(bad, measured=2.0, noise=1.0, limit=1.0, unit=bad, sample=1)
    sequence = SequenceResult(bad, 1, *([[1.0, 2.0]] * 5), 0.5, [1], {}, {})
    report = ParityReport("fail", {"engine": bad, bad: {bad: bad}}, [check], [sequence])
    page = report.to_html()
    assert "<script" not in page and page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;") >= 12
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")


def test_a_report_with_nan_is_still_valid_json(tmp_path):
    runner = Wrapped(lambda logits, _call: logits * np.nan)
    report = verify(runner, GOLDEN / "gqa", decode_steps=STEPS)
    assert report.verdict == "fail"
    report.write(tmp_path)
    json.loads((tmp_path / "parity.json").read_text(), parse_constant=lambda text: pytest.fail(text))


def test_progress_counts_up():
    seen = []
    verify(
        engine(),
        GOLDEN / "gqa",
        decode_steps=1,
        progress=lambda what, done: seen.append(done),
    )
    assert seen == sorted(seen) and 0.1 < seen[0] < 0.2 and seen[-1] == 0.96 and len(seen) > 8


@pytest.fixture
def short(tmp_path):
    """golden research-checkpoint with another context length, as a function of it."""

    def make(context):
        stored = torch.load(GOLDEN / "research-checkpoint" / "ckpt.pt", weights_only=True)
        stored["model_args"]["block_size"] = context
        torch.save(stored, tmp_path / "ckpt.pt")
        return tmp_path

    return make


@pytest.mark.parametrize(("context", "steps"), [(128, 64), (64, 32), (16, 8), (5, 2), (2, 1)])
def test_the_check_fits_itself_to_the_context(context, steps, short):
    folder = short(context)
    report = verify(ReferenceRunner(Reference(Weights(open_checkpoint(folder)), dtype=np.float32)), folder)
    assert report.verdict == "pass", report.failures
    assert report.summary["decode_steps"] == steps and report.summary["positions"] >= 100


def test_a_number_of_steps_that_does_not_fit_is_refused_with_what_does(short):
    folder = short(16)
    with pytest.raises(ConfigError, match="decode_steps: expected 1 to 15.*leave it out"):
        verify(engine(name="research-checkpoint"), folder, decode_steps=16)
    with pytest.raises(ConfigError, match="2 tokens or more.*--no-verify"):
        verify(engine(name="research-checkpoint"), short(1))


def test_bad_input_is_named():
    with pytest.raises(EngineError, match="not an engine"):
        verify(object(), GOLDEN / "gqa")
    with pytest.raises(TargetError, match="precision"):
        verify(engine(), GOLDEN / "gqa", precision="int3")
    with pytest.raises(ConfigError, match="decode_steps"):
        verify(engine(), GOLDEN / "gqa", decode_steps=10_000)
    with pytest.raises(ConfigError, match="prompt 0"):
        verify(engine(), GOLDEN / "gqa", prompts=[[256]])
    with pytest.raises(ConfigError, match="tokenizer"):
        verify(engine(), GOLDEN / "gqa", prompts=["text"])
    other = engine()
    other.vocab_size = 99
    with pytest.raises(EngineError, match="vocab_size"):
        verify(other, GOLDEN / "gqa")
    with pytest.raises(EngineError, match="taps"):
        verify(
            engine(),
            GOLDEN / "gqa",
            decode_steps=1,
            taps=lambda ids: {"wrong.name": np.zeros((len(ids), 64))},
        )
