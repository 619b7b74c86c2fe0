"""Frequencies agree with transformers' own functions, which ngpt/rope.py does not use."""

import numpy as np
import pytest

from ngpt.errors import ConfigError
from ngpt.rope import research_inv_freq, research_tables, rope_from_config

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
CASES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn, not truncated": {"rope_type": "yarn", **YARN, "truncate": False},
    "yarn, betas": {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn, mscale": {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, attention factor": {"rope_type": "yarn", **YARN, "attention_factor": 1.3},
}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_agree_with_transformers(case, fraction):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    params = {**CASES[case], "rope_theta": 500000.0, "partial_rotary_factor": fraction}
    llama = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rope_parameters=dict(params),
    )
    mine = rope_from_config({"rope_parameters": params}, head_dim=64, max_length=512)
    kind = CASES[case]["rope_type"]
    if kind == "default":
        dim = int(64 * fraction)
        theirs, scaling = 1 / 500000.0 ** (np.arange(0, dim, 2) / dim), 1.0
    else:
        tensor, scaling = rope_utils.ROPE_INIT_FUNCTIONS[kind](llama, device="cpu")
        theirs = tensor.double().numpy()
    assert mine.rotary_dim == int(64 * fraction)
    np.testing.assert_allclose(mine.inv_freq, theirs, rtol=1e-6)
    assert mine.scaling == pytest.approx(scaling, rel=1e-12)


def test_frequencies_are_float64_not_float32():
    w = rope_from_config({"rope_theta": 10000.0}, head_dim=64, max_length=512).inv_freq
    assert w[1] == 10000.0 ** (-2 / 64)


def test_research_tables_are_halves_of_the_interleaved_table():
    w = research_inv_freq(8)
    s, c = research_tables(w, 5)
    p = 3
    table = [f(p * w[j]) for j in range(4) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(s[p], table[:4], rtol=1e-15)
    np.testing.assert_allclose(c[p], table[4:], rtol=1e-15)


def test_yarn_needs_a_theta_with_a_logarithm():
    with pytest.raises(ConfigError, match="rope_theta"):
        rope_from_config({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", **YARN}}, head_dim=8, max_length=512)
