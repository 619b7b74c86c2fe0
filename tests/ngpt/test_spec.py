"""NGPTSpec: what a config means, and which configs are refused."""

import dataclasses
import json
import math
import pickle
from pathlib import Path

import pytest

from ngpt.config_keys import tidy
from ngpt.errors import CheckpointError, ConfigError, MissingPackageError, NGPTDeployError, UnsupportedError, shown
from ngpt.spec import NGPTSpec

GOLDEN = Path(__file__).parent.parent / "golden"


def config(**changes):
    base = json.loads((GOLDEN / "gqa" / "config.json").read_text())
    return {**base, **changes}


def test_absent_keys_take_the_8b_models_values():
    spec = NGPTSpec.from_config({"model_type": "ngpt"})
    assert (spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (131072, 4096, 21504)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (32, 32, 8, 128)
    assert (spec.mlp, spec.rope_theta, spec.max_length) == ("relu2", 1e6, 8192)
    assert spec.sqk_scale == pytest.approx(1 / 0.014)
    assert spec.attn_alpha_scale == pytest.approx(0.05 / 0.014)


def test_trap_7_r_is_initializer_range_except_for_suv():
    spec = NGPTSpec.from_config(config(initializer_range=0.5, suv_init_scaling=4.0, suv_init_value=2.0))
    assert (spec.sqk_scale, spec.sz_scale, spec.suv_scale) == (2.0, 2.0, 0.5)
    assert spec.attn_alpha_scale == spec.mlp_alpha_scale == 0.1


def test_null_head_dim_and_null_kv_heads():
    spec = NGPTSpec.from_config(config(head_dim=None, num_key_value_heads=None))
    assert (spec.head_dim, spec.num_kv_heads) == (16, 4)


def test_both_rope_spellings_mean_the_same():
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = NGPTSpec.from_config(config(rope_theta=5000.0, rope_scaling=scaling, partial_rotary_factor=0.5))
    new = config(rope_parameters={**scaling, "rope_theta": 5000.0, "partial_rotary_factor": 0.5})
    for key in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        del new[key]
    assert NGPTSpec.from_config(new) == old
    assert NGPTSpec.from_config({**new, "rope_theta": 5000.0}) == old, "an agreeing duplicate is no contradiction"


def test_digest_depends_on_every_field_and_survives_json():
    spec = NGPTSpec.from_config(config())
    assert NGPTSpec.from_config(config()).digest() == spec.digest()
    assert dataclasses.replace(spec, sz_scale=1.5).digest() != spec.digest()
    assert json.loads(json.dumps(spec.to_dict())) == spec.to_dict()


def test_eos_may_be_a_list_or_null():
    assert NGPTSpec.from_config(config(eos_token_id=[2, 5])).eos_token_ids == (2, 5)
    assert NGPTSpec.from_config(config(eos_token_id=None)).eos_token_ids == ()


def test_keys_that_transformers_writes_are_no_error():
    NGPTSpec.from_config(config(transformers_version="5.23.0", dtype="bfloat16", _name_or_path="x", id2label={}))


BAD = {
    "llama": ({"model_type": "llama"}, "model_type"),
    "unknown key": ({"sliding_window": 128}, "sliding_window"),
    "heads": ({"num_attention_heads": 5}, "num_attention_heads"),
    "kv heads above heads": ({"num_key_value_heads": 8}, "num_attention_heads"),
    "odd head_dim": ({"head_dim": 15}, "rotary channels"),
    "odd rotary part": ({"partial_rotary_factor": 0.2}, "rotary channels"),
    "rotary part above 1": ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    "head_dim undefined": ({"head_dim": None, "hidden_size": 66}, "hidden_size"),
    "theta twice": ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, "rope_theta"),
    "two blocks disagree": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0},
         "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "factor"),
    "type and rope_type": ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_type"),
    "unknown rope type": ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type"),
    "unknown rope key": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "speed": 1}}, "speed"),
    "rope factor missing": ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    "rope per layer": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    "llama3 bounds": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "high_freq_factor"),
    "negative theta": ({"rope_theta": -1.0}, "rope_theta"),
    "size is text": ({"hidden_size": "64"}, "hidden_size"),
    "size is bool": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "size is absurd": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "size is zero": ({"vocab_size": 0}, "vocab_size"),
    "flag is text": ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "r is zero": ({"initializer_range": 0}, "initializer_range"),
    "r is nan": ({"initializer_range": float("nan")}, "initializer_range"),
    "suv scaling zero": ({"suv_init_scaling": 0.0}, "suv_init_scaling"),
    "activation": ({"hidden_act": "mish"}, "hidden_act"),
    "eos outside": ({"eos_token_id": [2, 256]}, "eos_token_id[1]"),
    "pad outside": ({"pad_token_id": -2}, "pad_token_id"),
    "a sliding window": ({"sliding_window": 4096}, "sliding_window"),
    "a sliding window in use": ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window"),
    "layers that slide": ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    "layer types in words": ({"layer_types": "full_attention"}, "layer_types"),
    "chunks of attention": ({"attention_chunk_size": 128}, "attention_chunk_size"),
    "a tie of unknown meaning": ({"tie_qk_proj": True}, "tie_qk_proj"),
    "interleaved rope": ({"rope_interleaved": True}, "rope_interleaved"),
    "a scale of logits": ({"logit_scale": 0.5}, "logit_scale"),
    "experts": ({"num_experts": 8}, "num_experts"),
    "yarn's other factor": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attn_factor": 1.5}}, "attn_factor"),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    "an endless size": ({"hidden_size": float("inf")}, "hidden_size"),
    "a number of 400 digits": ({"initializer_range": 10**400}, "initializer_range"),
    "a size of 400 digits": ({"hidden_size": 10**400}, "hidden_size"),
    "a theta of 400 digits": ({"rope_theta": 10**400}, "rope_theta"),
    "a tiny theta": ({"rope_theta": 5e-324, "head_dim": 128}, "inv_freq"),
    "a scale that overflows": ({"initializer_range": 5e-324}, "scale"),
    "a token of 400 digits": ({"eos_token_id": 10**400}, "eos_token_id"),
    "a key of 100 000 characters": ({"x" * 100_000: 1}, "xxx"),
    "yarn divided by zero": (
        {"rope_scaling": {"type": "yarn", "factor": math.e, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": -10.0}},
        "yarn"),
    "eps negative": ({"mlp_norm_eps": -1.0}, "mlp_norm_eps"),
    "dropout": ({"attention_dropout": 1.0}, "attention_dropout"),
    "research with gqa": ({"position_code": "research"}, "position_code"),
    "research with rope": (
        {"position_code": "research", "num_key_value_heads": 4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "position_code"),
    "position code": ({"position_code": "alibi"}, "position_code"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_config_is_refused_by_name(case):
    changes, name = BAD[case]
    with pytest.raises(ConfigError) as caught:
        NGPTSpec.from_config(config(**changes))
    assert name in caught.value.what and len(str(caught.value)) < 800


YARN = {"factor": 2.0, "original_max_position_embeddings": 256}
FOREIGN = {
    "unsloth": {"unsloth_fixed": True, "unsloth_version": "2026.1"},
    "transformers.js": {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    "full attention": {"layer_types": ["full_attention"] * 3},
    "no window": {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 3},
    "a window that is off": {"sliding_window": 4096, "use_sliding_window": False},
    "llama": {"pretraining_tp": 1, "rms_norm_eps": 1e-5},
    "gpt": {"layer_norm_eps": 1e-5, "resid_pdrop": 0.1},
    "attention": {"_attn_implementation_internal": "sdpa", "_flash_attn_2_enabled": True},
    "how to load it": {"attn_implementation": "flash_attention_2", "use_return_dict": True, "dtype": "auto"},
    "no dtype of torch's": {"dtype": "int9"},
    "inference": {"keys_to_ignore_at_inference": ["past_key_values"]},
    "null": {"quantization_config": None, "num_experts": None, "rope_interleaved": None},
    "neutral": {"rope_interleaved": False, "is_causal": True, "logit_scale": 1.0},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_keys_of_other_tools_that_change_nothing_are_passed_over_and_told(case):
    assert NGPTSpec.from_config(config(**FOREIGN[case])) == NGPTSpec.from_config(config())
    kept, notes = tidy(config(**FOREIGN[case]))
    assert kept == config()
    told = [key for key in FOREIGN[case] if key != "quantization_config"]
    assert len(notes) == 1 and all(repr(key) in notes[0] for key in told)


def test_no_pad_token_may_be_written_as_minus_one():
    spec = NGPTSpec.from_config(config(pad_token_id=-1, eos_token_id=-1))
    assert spec.pad_token_id is None and spec.eos_token_ids == ()
    assert "pad_token_id -1" in " ".join(tidy(config(pad_token_id=-1))[1])


def test_whole_numbers_may_be_written_with_a_point():
    written = {"hidden_size": 64.0, "head_dim": 16.0, "max_position_embeddings": 512.0, "eos_token_id": [2.0]}
    spec = NGPTSpec.from_config(config(**written))
    assert spec == NGPTSpec.from_config(config(eos_token_id=[2])) and isinstance(spec.hidden_size, int)


def test_a_dtype_may_be_written_as_python_shows_it():
    assert tidy(config(torch_dtype="torch.bfloat16")) == (config(torch_dtype="bfloat16"), ())


def test_remarks_in_a_rope_block_are_passed_over_and_told():
    block = {"type": "yarn", **YARN, "finetuned": True, "attn_factor": 1.0, "extrapolation_factor": 1, "beta_fast": None}
    assert NGPTSpec.from_config(config(rope_scaling=block)) == NGPTSpec.from_config(config(rope_scaling={"type": "yarn", **YARN}))
    assert "rope_scaling.finetuned" in tidy(config(rope_scaling=block))[1][0]
    plain = {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": 512}
    assert NGPTSpec.from_config(config(rope_scaling=plain)) == NGPTSpec.from_config(config())


def test_su_is_longropes_older_name():
    with pytest.raises(UnsupportedError, match="longrope"):
        NGPTSpec.from_config(config(rope_scaling={"type": "su", "short_factor": [1.0], "long_factor": [1.0]}))


def test_values_from_outside_are_shown_short_whatever_they_are():
    nested = 0
    for _ in range(60):
        nested = [nested, nested]
    values = [nested, {"a": nested}, "x" * 10**6, 10**5000, b"y" * 10**6, {1: nested}, (nested,) * 9, object(), "\x1b[2J\ud800\n"]
    for value in values:
        assert len(shown(value)) < 400 and shown(value).isprintable()
    assert [shown(value) for value in ("ngpt", 3, None, True, 1.5, [1, 2])] == ["'ngpt'", "3", "None", "True", "1.5", "[1, 2]"]
    error = ConfigError("\x1b[2Ja\ud800", expected="b" * 10**6, found="c\nd")
    assert "\x1b" not in str(error) and len(str(error)) < 5000 and "c\nd" in str(error)
    str(error).encode()


def test_a_config_without_model_type_is_not_ngpt():
    with pytest.raises(ConfigError, match="not an nGPT checkpoint"):
        NGPTSpec.from_config({"hidden_size": 64})


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "custom_wavelengths"])
def test_rope_types_an_engine_cannot_have_are_refused_by_name(kind):
    with pytest.raises(UnsupportedError, match=kind):
        NGPTSpec.from_config(config(rope_scaling={"rope_type": kind, "factor": 2.0}))


def test_quantised_checkpoints_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="quantization_config"):
        NGPTSpec.from_config(config(quantization_config={"quant_method": "fp8"}))


def test_error_text_names_thing_expected_found_and_remedy():
    error = CheckpointError("tensor 'x'", expected="[2]", found="[3]", remedy="Fix it.")
    assert str(error) == "tensor 'x': expected [2], found [3]. Fix it."
    assert str(CheckpointError("plain")) == "plain"
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.found) == (str(error), "[3]")
    assert issubclass(MissingPackageError, ImportError) and issubclass(MissingPackageError, NGPTDeployError)
