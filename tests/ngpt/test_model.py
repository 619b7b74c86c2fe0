"""NGPTForCausalLM against golden data, the traps of the architecture, and what transformers' users expect of a model."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache, pipeline

from ngpt import NGPTConfig, NGPTForCausalLM, NGPTModel
from ngpt.checkpoint import open_checkpoint, save_hf
from ngpt.layers import hypersphere_update, unit_norm
from ngpt.remote_code import add_code
from ngpt.training import normalize_weights_, unit_matrices
from tests.conftest import GOLDEN, TINY, Golden

# Bounds of the golden data's own description: absolute error of logits.
LOGIT_ERROR = {torch.float32: 2e-5, torch.float64: 5e-6}
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip


def load(folder, dtype=torch.float32, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.to(dtype) if dtype == torch.float64 else model


def small(**changes):
    torch.manual_seed(0)
    model = NGPTForCausalLM(NGPTConfig(**(SMALL | changes))).eval()
    with torch.no_grad():  # away from the initial constants, so that a scale that is dropped shows
        for name, p in model.named_parameters():
            if name.endswith(("sqk.weight", "suv.weight", "sz.weight", "_alpha")):
                p.mul_(torch.empty_like(p).uniform_(0.5, 1.5))
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_logits_and_hidden_states(hf_case, dtype, attention):
    model = load(hf_case.folder, dtype, attn_implementation=attention)
    ids, mask = torch.from_numpy(hf_case.ids), torch.from_numpy(hf_case.mask)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
    error = np.abs(out.logits.double().numpy() - hf_case.logits)[hf_case.real].max()
    states = np.stack([h.double().numpy() for h in out.hidden_states])
    assert error <= LOGIT_ERROR[dtype]
    assert np.abs(states - hf_case.hidden_states)[:, hf_case.real].max() <= LOGIT_ERROR[dtype] / 10
    assert torch.isfinite(out.logits).all()


def test_golden_greedy(hf_case):
    ids, mask = torch.from_numpy(hf_case.ids), torch.from_numpy(hf_case.mask)
    out = load(hf_case.folder).generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None)
    np.testing.assert_array_equal(out.numpy(), hf_case.greedy)


@pytest.mark.parametrize("name", ["research-checkpoint", "research-train-py"])
def test_research_checkpoint_converts_exactly(name, tmp_path):
    case = Golden(name)
    with open_checkpoint(case.folder) as checkpoint:
        save_hf(checkpoint, tmp_path / "hf")
    model = load(tmp_path / "hf", torch.float64)
    ids = torch.from_numpy(case.ids)
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    assert np.abs(logits - case.logits).max() <= 5e-6
    new = case.greedy.shape[1] - ids.shape[1]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None)
    np.testing.assert_array_equal(out.numpy(), case.greedy)


def test_flex_attention_agrees_with_eager():
    ids = torch.arange(20)[None] % 61
    model = small(head_dim=16)
    with torch.no_grad():
        eager = model(ids).logits
        model.set_attn_implementation("flex_attention")
        flex = model(ids).logits
    assert (eager - flex).abs().max() <= 2e-5


def test_trap_1_softmax_scale_multiplies_by_sqrt_head_dim():
    model = small()
    assert model.model.layers[0].self_attn.scaling == pytest.approx(8**0.5)


def test_trap_2_sqk_is_squared_on_q_only_and_after_rope():
    model = small()
    attention = model.model.layers[0].self_attn
    seen = {}

    def spy(module, query, key, *args, **kwargs):
        seen.update(q=query, k=key)
        return torch.zeros(*query.shape[:1], query.shape[2], query.shape[1], query.shape[3]), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["spy"] = spy
    attention.config._attn_implementation = "spy"
    try:
        h = unit_norm(torch.randn(1, 5, 32))
        attention(h, model.model.rotary_emb(h, torch.arange(5)[None]))
    finally:
        attention.config._attn_implementation = "eager"
        del ALL_ATTENTION_FUNCTIONS._local_mapping["spy"]
    sqk = (attention.sqk.weight * (1.0 / 0.2)).view(4, 8)
    np.testing.assert_allclose((seen["q"] / sqk.square()[None, :, None]).norm(dim=-1).detach(), 1.0, atol=1e-5)
    np.testing.assert_allclose(seen["k"].norm(dim=-1).detach(), 1.0, atol=1e-5)


def test_trap_3_alpha_counts_by_absolute_value():
    model, ids = small(), torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
        for layer in model.model.layers:
            layer.attn_alpha.neg_()
            layer.mlp_alpha.neg_()
        assert torch.equal(model(ids).logits, before)


def test_trap_4_dead_mlp_gives_no_nan_and_the_definition_for_small_outputs():
    h, rate = unit_norm(torch.randn(3, 16, dtype=torch.float64)), torch.full((16,), 0.3, dtype=torch.float64)
    dead = hypersphere_update(h, torch.zeros_like(h), rate, 1e-6)
    torch.testing.assert_close(dead, h)  # norm(h - rate * h) with one rate for all channels is h again
    faint = torch.randn(3, 16, dtype=torch.float64) * 1e-6
    unit = unit_norm(faint, 1e-6)
    torch.testing.assert_close(unit, faint / (faint.norm(dim=-1, keepdim=True) + 1e-6))


def test_trap_5_and_7_scales_divide_by_what_they_should():
    """Doubling r along with the stored sqk, alpha and sz changes nothing; suv answers to suv_init_scaling alone."""
    ids = torch.arange(12)[None]
    one, two = small(), small(initializer_range=0.4)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        for name, p in two.named_parameters():
            if name.endswith(("sqk.weight", "sz.weight", "_alpha")):
                p.mul_(2)
        torch.testing.assert_close(two(ids).logits, one(ids).logits)
        three = small(suv_init_scaling=3.0)
        three.load_state_dict(one.state_dict())
        for layer in three.model.layers:
            layer.mlp.suv.weight.mul_(3)
        torch.testing.assert_close(three(ids).logits, one(ids).logits)


def test_trap_6_tied_embeddings_keep_the_table_unscaled(tmp_path):
    model = small(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load(tmp_path)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("position_code", ["rope", "research"])
def test_trap_8_left_padding_changes_nothing(position_code):
    model = small(position_code=position_code)
    ids = torch.randint(1, 61, (1, 9))
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    with torch.no_grad():
        plain, shifted = model(ids).logits, model(padded, attention_mask=mask).logits
    assert torch.isfinite(shifted).all()
    torch.testing.assert_close(shifted[:, 4:], plain, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rope", [
    {"rope_type": "default", "rope_theta": 500.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
     "original_max_position_embeddings": 32},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
])  # fmt: skip
def test_rope_types_in_both_spellings_survive_a_round_trip(rope, tmp_path):
    new = small(rope_parameters=dict(rope))
    old_spelling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    outer = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    old = small(rope_scaling=old_spelling, **outer)
    ids = torch.randint(0, 61, (2, 40))
    new.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.no_grad():
        expected = new(ids).logits
        assert torch.equal(old(ids).logits, expected)
        assert torch.equal(again(ids).logits, expected)


def test_custom_wavelengths_are_refused():
    with pytest.raises(Exception, match="custom_wavelengths"):
        NGPTConfig(rope_scaling={"rope_type": "custom_wavelengths"})


def test_a_fresh_model_starts_on_the_hypersphere():
    torch.manual_seed(1)
    model = NGPTForCausalLM(NGPTConfig(**SMALL))
    for weight, axis in unit_matrices(model):
        torch.testing.assert_close(weight.norm(dim=axis), torch.ones(weight.shape[1 - axis]))
    layer = model.model.layers[1]
    for p, value in (
        (layer.self_attn.sqk.weight, 0.2),
        (layer.attn_alpha, 0.2),
        (layer.mlp.suv.weight, 1.0),
        (model.sz.weight, 0.2),
    ):
        assert torch.equal(p, torch.full_like(p, value))


def test_the_hidden_state_stays_on_the_sphere():
    with torch.no_grad():
        states = small()(torch.randint(0, 61, (2, 30)), output_hidden_states=True).hidden_states
    for h in states:
        torch.testing.assert_close(h.norm(dim=-1), torch.ones(2, 30), atol=1e-6, rtol=0)


def test_it_trains_and_returns_to_the_sphere():
    model = small().train()
    optimizer, ids = torch.optim.Adam(model.parameters(), lr=0.02), torch.randint(0, 61, (4, 24))
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        normalize_weights_(model)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    for weight, axis in unit_matrices(model):
        torch.testing.assert_close(weight.norm(dim=axis), torch.ones(weight.shape[1 - axis]))


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = torch.randint(0, 61, (2, 16))
    gradients = []
    for checkpointing in (False, True):
        model = small().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_logits_to_keep_attentions_and_dynamic_against_static_cache():
    model, ids = small(), torch.randint(1, 61, (2, 14))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        full = model(ids, output_attentions=True)
        kept = model(ids, logits_to_keep=3).logits
        # Not to the bit: a product with fewer rows may be summed in another order.
        assert kept.shape == (2, 3, 61) and (kept - full.logits[:, -3:]).abs().max() <= 1e-6
        assert len(full.attentions) == 2 and full.attentions[0].shape == (2, 4, 14, 14)
        dynamic = model.generate(ids, max_new_tokens=12, do_sample=False)
        static = model.generate(ids, max_new_tokens=12, do_sample=False, cache_implementation="static")
        cache = StaticCache(config=model.config, max_cache_len=32)
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, full.logits, atol=1e-5, rtol=0)
    assert torch.equal(dynamic, static)


def test_generate_samples_and_beams():
    model, ids = small(), torch.randint(1, 61, (2, 6))
    sampled = [model.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.9) for _ in range(2) if torch.manual_seed(3)]
    assert torch.equal(*sampled)
    assert model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False).shape == (2, 14)


def test_auto_classes_device_map_half_precision_and_round_trip(tmp_path):
    model = load(GOLDEN / "gqa", torch.bfloat16, device_map="auto")
    assert model.model.layers[0].attn_alpha.dtype == torch.float32  # alphas stay wide
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert isinstance(AutoConfig.from_pretrained(GOLDEN / "gqa"), NGPTConfig)
    assert isinstance(AutoModel.from_pretrained(GOLDEN / "gqa"), NGPTModel)
    source = load(GOLDEN / "llama3-rope-bias")
    source.save_pretrained(tmp_path, max_shard_size="300KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for name, tensor in load(tmp_path).state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_pipeline_writes_text():
    out = pipeline("text-generation", model=str(TINY), max_new_tokens=8, do_sample=False)("def __init__(self")
    assert out[0]["generated_text"].startswith("def __init__(self") and len(out[0]["generated_text"]) > 20


REMOTE = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
g = np.load(sys.argv[1] + '/golden.npz')
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = torch.tensor(g['input_ids'])
e = np.abs(m(ids).logits.detach().numpy() - g['logits']).max()
greedy = m.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None).numpy()
assert e < 2e-5 and (greedy == g['greedy']).all() and 'ngpt' not in sys.modules, e
"""


def test_trust_remote_code_loads_and_generates_without_this_package(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "gqa", folder)
    add_code(folder)
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-I", "-c", REMOTE, str(folder)], check=True, cwd=tmp_path, env=env)


@pytest.mark.parametrize("bad", [
    {"num_key_value_heads": 3}, {"head_dim": 7}, {"initializer_range": 0.0}, {"position_code": "alibi"},
])  # fmt: skip
def test_contradictory_configs_are_refused_by_name(bad):
    with pytest.raises(Exception, match=next(iter(bad))):
        NGPTConfig(**(SMALL | bad))


def test_config_defaults_are_the_8b_models():
    config = json.loads(NGPTConfig().to_json_string(use_diff=False))
    wanted = {"vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "num_hidden_layers": 32, "head_dim": 128,
              "initializer_range": 0.014, "hidden_act": "relu2", "attn_alpha_init_value": 0.05, "num_key_value_heads": 8}  # fmt: skip
    assert {k: config[k] for k in wanted} == wanted
    assert config["rope_parameters"]["rope_theta"] == 1_000_000.0


@pytest.mark.skipif("NGPT_8B" not in os.environ, reason="set NGPT_8B to the Normalized-Nemotron-8B-Reasoning folder")
def test_acceptance_text_of_the_8b_model():
    from transformers import AutoTokenizer

    folder = os.environ["NGPT_8B"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder, torch.float16, device_map="auto")
    prompt = "What is the largest planet in solar system?"
    out = model.generate(**tokenizer(prompt, return_tensors="pt").to(model.device), max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == prompt + "\nAnswer: Jupiter\n\nWhat is the answer"


def test_missing_scale_is_not_silently_initialised(tmp_path):
    tensors = load_file(GOLDEN / "gqa" / "model.safetensors")
    shutil.copytree(GOLDEN / "gqa", tmp_path / "c")
    del tensors["sz.weight"]
    save_file(tensors, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    from ngpt.errors import MissingTensorError

    with pytest.raises(MissingTensorError, match="sz.weight"):
        open_checkpoint(tmp_path / "c")
