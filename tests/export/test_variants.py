"""Every variant of the architecture, in both ONNX forms and as a TensorRT network, against the PyTorch model in float64."""

import numpy as np
import pytest
import torch

from export.lowerings.onnx import OnnxPortable, OnnxRuntime
from export.lowerings.tensorrt.library import load_library
from ngpt import NGPTConfig, NGPTForCausalLM
from tests.export.tensorrt_network import OLD_FEATURES, Network
from tests.export.test_onnx import export, feeds, session

BASE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1, "max_position_embeddings": 256,
}  # fmt: skip
ROTATED = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
VARIANTS = {
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "partial rotary": {"rope_parameters": ROTATED | {"partial_rotary_factor": 0.5}},
    "partial rotary with yarn": {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
    "yarn": {"rope_parameters": YARN},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    "silu": {"hidden_act": "silu"},
    "gelu": {"hidden_act": "gelu"},
    "gated": {"gated_mlp": True, "hidden_act": "silu", "mlp_norm_eps": 0.0},
    "research positions without a gate": {"position_code": "research", "num_key_value_heads": 4},
    "odd vocabulary": {"vocab_size": 251},
    "odd sizes": {"hidden_size": 72, "intermediate_size": 100, "head_dim": 24},
    "other constants": {
        "sqk_init_value": 1.5, "attn_alpha_init_value": 0.2, "mlp_alpha_init_value": -0.1, "suv_init_value": 0.7,
        "suv_init_scaling": 2.0, "sz_init_value": 3.0,
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "faint MLP": {"suv_init_value": 1e-4},
}  # fmt: skip


class Case:
    """A random checkpoint away from its initial constants, with PyTorch's float64 logits."""

    def __init__(self, changes, folder):
        torch.manual_seed(7)
        model = NGPTForCausalLM(NGPTConfig(**(BASE | changes))).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("sqk.weight", "suv.weight", "sz.weight", "_alpha")):
                    p.mul_(torch.empty_like(p).uniform_(0.5, 1.5) * torch.where(torch.rand_like(p) < 0.2, -1.0, 1.0))
                elif name.endswith(".bias"):
                    p.normal_(0, 0.1)
            model.save_pretrained(folder)
            self.folder = folder
            self.ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 50))
            self.mask = np.ones_like(self.ids)
            self.logits = model.double()(torch.from_numpy(self.ids)).logits.numpy()


ODD_HEADS = {
    "heads of 12": {"head_dim": 12},
    "heads of 20, one key head, biases": {"head_dim": 20, "num_key_value_heads": 1, "attention_bias": True},
    "heads of 6, partly rotated": {"head_dim": 6, "rope_parameters": ROTATED | {"partial_rotary_factor": 0.7}},
    "heads of 10, research positions": {"head_dim": 10, "position_code": "research", "num_key_value_heads": 4},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_HEADS)
def test_heads_that_are_no_multiple_of_8_are_padded_in_the_fused_form(name, tmp_path):
    """In one call, and as a prompt followed by steps over the wider cache."""
    case = Case(ODD_HEADS[name], tmp_path / "checkpoint")
    bound, prompt = 2e-5 * max(1.0, np.abs(case.logits).max() / 8), 47
    for lowering in (OnnxPortable, OnnxRuntime):
        spec = export(case, lowering, tmp_path / f"{lowering.__name__}.onnx")
        run = session(tmp_path / f"{lowering.__name__}.onnx")
        channels = run.get_inputs()[3].shape[-1]
        assert channels == (spec.head_dim if lowering is OnnxPortable else -(-spec.head_dim // 8) * 8)
        logits, *past = run.run(None, feeds(spec, case.ids[:, :prompt], case.mask[:, :prompt], channels=channels))
        parts = [logits]
        for step in range(prompt, case.ids.shape[1]):
            logits, *past = run.run(None, feeds(spec, case.ids[:, step : step + 1], case.mask[:, : step + 1], past))
            parts.append(logits)
        assert np.abs(np.concatenate(parts, axis=1) - case.logits).max() <= bound, lowering.__name__


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path):
    case = Case(VARIANTS[name], tmp_path / "checkpoint")
    # The golden bound of 2e-5 is for logits of size 8; other constants make larger ones.
    bound = 2e-5 * max(1.0, np.abs(case.logits).max() / 8)
    for lowering in (OnnxPortable, OnnxRuntime):
        spec = export(case, lowering, tmp_path / f"{lowering.__name__}.onnx")
        got = session(tmp_path / f"{lowering.__name__}.onnx").run(["logits"], feeds(spec, case.ids, case.mask))[0]
        assert np.abs(got - case.logits).max() <= bound, lowering.__name__


@pytest.mark.parametrize("form", ["native", "composed"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_as_a_tensorrt_network(name, form, tmp_path, monkeypatch):
    """Evaluated in NumPy from what TensorRT-RTX holds: see tests/export/test_tensorrt.py."""
    library = load_library("tensorrt_rtx")
    for feature in OLD_FEATURES if form == "composed" else ():
        monkeypatch.setattr(library, feature, False)
    case = Case(VARIANTS[name], tmp_path / "checkpoint")
    bound = 2e-5 * max(1.0, np.abs(case.logits).max() / 8)
    with Network(case.folder, library) as net:
        got = np.stack([net.run(ids)["logits"] for ids in case.ids])
    assert np.abs(got - case.logits).max() <= bound
