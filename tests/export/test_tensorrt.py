"""The TensorRT lowering: the network that TensorRT-RTX holds, computed in NumPy, against golden data.

The arithmetic is tests/doubles/tensorrt_evaluator.py's, our reading of each layer's documented meaning: it needs no
GPU and proves nothing about one.
"""

import dataclasses

import numpy as np
import pytest
import torch

from export.lowerings.tensorrt.library import load_library
from export.lowerings.tensorrt.native import TensorRT
from export.lowerings.tensorrt.weights_file import WeightsFile
from export.network import define_network
from export.precision import ROW, TENSORRT, Format
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import BuildError, UnsupportedError
from ngpt.weights import Weights
from tests.conftest import GOLDEN, Golden
from tests.doubles.reference import Reference
from tests.export.tensorrt_network import OLD_FEATURES, Network

LOGIT_ERROR = 2e-5


@pytest.fixture
def library():
    return load_library("tensorrt_rtx")


@pytest.mark.parametrize("form", ["native", "composed"])
def test_the_network_tensorrt_holds_computes_golden_logits(golden, library, form, monkeypatch):
    """`composed` is for versions without cache-update, rotary and attention layers."""
    if form == "composed":
        for feature in OLD_FEATURES:
            monkeypatch.setattr(library, feature, False)
    layers = len(golden.hidden_states) - 1 if "hidden_states" in golden.arrays else 0
    names = ["embed", *(f"layers.{i}.mlp.update" for i in range(layers))]
    with Network(golden.folder, library, taps=names) as net:
        for row, real in enumerate(golden.real):
            got = net.run(golden.ids[row][real])
            assert np.abs(got["logits"] - golden.logits[row][real]).max() <= LOGIT_ERROR
            for index, name in enumerate(names if layers else ()):
                assert np.abs(got[f"{name}.tap"] - golden.hidden_states[index][row][real]).max() <= 2e-6, name


@pytest.mark.parametrize("form", ["native", "composed"])
def test_rows_of_different_lengths_decode_as_if_alone(library, form, monkeypatch):
    if form == "composed":
        for feature in OLD_FEATURES:
            monkeypatch.setattr(library, feature, False)
    case = Golden("gqa")
    with Network(case.folder, library) as net:
        texts = [case.ids[0][:9], case.ids[1][:4], case.ids[0][3:17]]
        caches, wanted = [], []
        for text in texts:
            _, cache = net.step(text[None, :-1], [0], net.empty(1))
            caches.append(cache)
            wanted.append(net.step(text[None, -1:], [len(text) - 1], cache)[0]["logits"][0])
        together = {name: np.concatenate([cache[name] for cache in caches]) for name in caches[0]}
        got, after = net.step([[text[-1]] for text in texts], [len(text) - 1 for text in texts], together)
        assert np.abs(got["logits"] - np.array(wanted)).max() <= 1e-6
        untouched = after["past_key_values.0.key"][1, :, len(texts[1]) :]
        assert (untouched == 7.0).all()  # a row writes its own new place and nothing else


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_as_close_to_golden_as_pytorch_in_the_same_type(hf_case, library, precision):
    """The measure is what PyTorch itself loses in this type; float32 norms should lose less, never more than twice as much."""
    from ngpt import NGPTForCausalLM

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    model = NGPTForCausalLM.from_pretrained(hf_case.folder, dtype=dtype, attn_implementation="eager")
    ours, theirs = [], []
    with Network(hf_case.folder, library, precision) as net, torch.no_grad():
        for row, real in enumerate(hf_case.real):
            ids, want = hf_case.ids[row][real], hf_case.logits[row][real]
            ours.append(net.run(ids)["logits"] - want)
            theirs.append(model(torch.from_numpy(ids)[None]).logits[0].double().numpy() - want)
    ours, theirs = (np.sqrt(np.mean(np.concatenate(e) ** 2)) for e in (ours, theirs))
    assert 0 < ours <= 2 * theirs


@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_quantised_networks_multiply_by_the_dequantised_weights(library, precision):
    """Against a float64 network with the same dequantised weights; the noise is that of the float16 network."""
    case = Golden("gqa")

    def replace(name, matrix):
        if name == "embed":
            return matrix.astype(np.float16)
        return TENSORRT[precision].format_of(name).round_trip(matrix)

    def rms(error):
        return float(np.sqrt(np.mean(error**2)))

    with Network(case.folder, library, precision) as net, Network(case.folder, library, "fp16") as plain:
        plain_weights = DeployedWeights(Weights(net.checkpoint))
        exact, _ = Reference(plain_weights, replace=replace)(case.ids)
        original, _ = Reference(plain_weights)(case.ids)
        got = np.stack([net.run(ids)["logits"] for ids in case.ids])
        noise = np.stack([plain.run(ids)["logits"] for ids in case.ids]) - case.logits
    assert rms(got - exact) <= 4 * rms(noise)
    assert rms(exact - original) > 4 * rms(noise)  # the formats do round: the check above is not empty


def test_float16_keeps_relu2_in_range(library):
    """relu2 of a value near sqrt(hidden size) times suv leaves float16's range; the branch is scaled so that it does not."""
    case = Golden("gqa")
    with Network(case.folder, library, "fp16", taps=["layers.0.mlp.act"]) as net:
        act = net.run(case.ids[0])["layers.0.mlp.act.tap"]
        size = net.spec.hidden_size
        plain = Reference(DeployedWeights(Weights(net.checkpoint)))
    taps = {}
    plain(case.ids[:1], taps=taps)
    u = plain.linear("layers.0.mlp.up", taps["layers.0.attn.update"])
    assert np.allclose(act, np.maximum(u, 0)[0] ** 2 / np.sqrt(size), rtol=2e-2, atol=1e-3)


def test_only_the_wanted_tokens_get_logits(library):
    case = Golden("gqa")
    with Network(case.folder, library) as net:
        ids = case.ids[:1, :6]
        feeds = dict(
            net.empty(1), input_ids=ids, position_ids=np.arange(6)[None], write_at=[0], lengths=[6], logit_rows=[5, 2]
        )  # fmt: skip
        logits = net.evaluate(feeds)["logits"]
    assert logits.shape == (2, net.spec.vocab_size)
    assert np.abs(logits - case.logits[0, [5, 2]]).max() <= LOGIT_ERROR


def test_layers_and_tensors_carry_the_traces_names(library):
    with Network(GOLDEN / "gqa", library, "fp16") as net:
        network, trt = net.network, library.trt
        names = {network.get_layer(i).name for i in range(network.num_layers)}
        for layer in range(3):
            assert {
                f"layers.{layer}.{tap}" for tap in ("attn.qkv", "attn.o", "attn.update", "mlp.up", "mlp.act", "mlp.update")
            } <= names
            cache = network.get_output(1 + 2 * layer)
            assert (
                cache.name == f"present.{layer}.key"
                and tuple(cache.shape) == (-1, 2, 512, 16)
                and cache.dtype == trt.DataType.HALF
            )
        kinds = [network.get_layer(i).type for i in range(network.num_layers)]
        assert kinds.count(trt.LayerType.KV_CACHE_UPDATE) == 6 and kinds.count(trt.LayerType.ATTENTION_INPUT) == 3
        assert kinds.count(trt.LayerType.MATRIX_MULTIPLY) == 3 * 4 + 1
        attention = next(
            layer for i in range(network.num_layers) if (layer := network.get_layer(i)).type.name == "ATTENTION_INPUT"
        )
        # Every key beyond them is masked as well, so that logits cannot show whether the kernel may skip it.
        assert [attention.get_input(i).name for i in (1, 2, 3, 6)] == ["present.0.key", "present.0.value", "mask", "lengths"]
        logits = network.get_output(0)
        assert logits.name == "logits" and tuple(logits.shape) == (-1, 256) and logits.dtype == trt.DataType.FLOAT


@pytest.mark.parametrize("precision", sorted(TENSORRT))
def test_the_stored_type_is_the_precisions_and_norms_are_float32(library, precision):
    types = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
    with Network(GOLDEN / "gqa", library, precision) as net:
        tensors = {(t := net.network.get_layer(i).get_output(0)).name: t.dtype.name for i in range(net.network.num_layers)}
    assert tensors["layers.0.attn.update"] == tensors["layers.0.mlp.act"] == types[TENSORRT[precision].arithmetic]
    assert tensors["layers.0.attn.qk_norm"] == tensors["layers.0.attn.update.f32.unit"] == "FLOAT"
    stored = {"fp8": "FP8", "int8": "INT8", "int4": "INT4"}
    if precision in stored:
        assert tensors["layers.0.mlp.down.weight.data"] == stored[precision]
        assert tensors["head.weight.data"] == ("FP8" if precision == "fp8" else "INT8")


class Wrong(TensorRT):
    """A lowering with one deliberate mistake, as a broken change would make it."""

    mistake = ""

    def activation(self, name, kind, x):
        if self.mistake == "type":
            return self.network.add_cast(x, self.float32).get_output(0)
        if self.mistake == "shape":
            return self.reshape(name, x, (0, 0, 3))
        if self.mistake == "name":
            return super().activation("embed", kind, x)
        return super().activation(name, kind, x)

    def narrow(self, name, x):
        return x if self.mistake == "type" else super().narrow(name, x)


@pytest.mark.parametrize(
    "mistake, where", [("type", "present.0.key"), ("shape", "layers.0.mlp.down"), ("name", "embed.relu|embed")]
)
def test_mistakes_are_reported_where_they_are_made(library, mistake, where):
    _, network = library.create_network()
    with open_checkpoint(GOLDEN / "gqa") as checkpoint, WeightsFile() as scratch:
        wrong = Wrong(DeployedWeights(Weights(checkpoint)), library, network, scratch, TENSORRT["fp16"])
        wrong.mistake = mistake
        with pytest.raises(BuildError, match=rf"tensorrt_rtx refuses the layer ({where})") as error:
            define_network(wrong)
    assert error.value.found


def test_an_unknown_format_and_a_missing_type_are_refused_by_name(library):
    _, network = library.create_network()
    with open_checkpoint(GOLDEN / "gqa") as checkpoint, WeightsFile() as scratch:
        weights = DeployedWeights(Weights(checkpoint))
        strange = dataclasses.replace(TENSORRT["fp8"], projections=Format("float8_e4m3", ROW, "float16"), name="strange")
        object.__setattr__(strange.projections, "code", "int3")
        with pytest.raises(UnsupportedError, match="no data type int3"):
            TensorRT(weights, library, network, scratch, strange)
    with pytest.raises(UnsupportedError, match="no data type fp3"):
        library.dtype("fp3")
    with pytest.raises(UnsupportedError, match=r"SM90.*SM120"):
        library.compute_capability("9.0")


def test_a_weights_file_keeps_values_and_gives_its_disk_back(tmp_path):
    small, large = np.arange(5, dtype=np.float32), np.random.default_rng(0).standard_normal((300, 301)).astype(np.float16)
    with WeightsFile(tmp_path) as scratch:
        kept = [scratch.add(small), scratch.add(large), scratch.add(large + 1)]
        del small
        assert isinstance(kept[1].base, np.memmap) or isinstance(kept[1], np.memmap)
        np.testing.assert_array_equal(kept[1], large)
        np.testing.assert_array_equal(kept[2], large + 1)
        assert list(tmp_path.iterdir()) == []  # the file has no name from the start: nothing is left by a crash
        del kept
