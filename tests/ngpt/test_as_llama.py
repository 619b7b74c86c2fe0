"""Where nGPT has no reason to differ, it behaves as transformers' own Llama does: arguments, outputs, heads, vocabulary sizes."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from engines import build_engine, load_engine
from ngpt import NGPTConfig, NGPTForCausalLM, NGPTForSequenceClassification, NGPTForTokenClassification
from ngpt.checkpoint import fold_scales, open_checkpoint, save_hf
from tests.ngpt.test_model import load, small

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(params=["eager", "sdpa"])
def pair(request):
    """(Llama, nGPT) of the same sizes, with one implementation of attention."""
    torch.manual_seed(0)
    models = LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), NGPTForCausalLM(NGPTConfig(**SIZES)).eval()
    for model in models:
        model.set_attn_implementation(request.param)
    return models


def outline(value):
    """Shapes, names and types of an output, or the type of the error."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple):
        return [outline(item) for item in value]
    if hasattr(value, "items"):
        return {key: outline(item) for key, item in value.items()}
    return type(value).__name__


def outcome(call, model):
    try:
        return outline(call(model))
    except Exception as error:
        return type(error).__name__


CALLS = {
    "plain": lambda m: m(IDS),
    "labels": lambda m: m(IDS, labels=IDS),
    "a tuple": lambda m: m(IDS, labels=IDS, return_dict=False),
    "hidden states": lambda m: m(IDS, output_hidden_states=True),
    "attention weights": lambda m: m(IDS, output_attentions=True),
    "no cache": lambda m: m(IDS, use_cache=False),
    "the last logits": lambda m: m(IDS, logits_to_keep=3),
    "chosen logits": lambda m: m(IDS, logits_to_keep=torch.tensor([0, 5])),
    "embeddings": lambda m: m(inputs_embeds=m.get_input_embeddings()(IDS)),
    "embeddings and ids": lambda m: m(IDS, inputs_embeds=m.get_input_embeddings()(IDS)),
    "neither": lambda m: m(),
    "the older name of the cache": lambda m: m(IDS, past_key_values=DynamicCache(config=m.config)),
    "a mask of four dimensions": lambda m: m(IDS, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()),
    "token types that are all zero": lambda m: m(IDS, token_type_ids=torch.zeros_like(IDS)),
    "everything that generate returns": lambda m: m.generate(
        IDS, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_scores=True, output_hidden_states=True
    ),
    "an assistant": lambda m: m.generate(IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, assistant_model=m),
    "generating from embeddings": lambda m: m.generate(
        inputs_embeds=m.get_input_embeddings()(IDS), max_new_tokens=3, do_sample=False, eos_token_id=None
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_llama_gives(pair, name):
    llama, ngpt = (outcome(CALLS[name], model) for model in pair)
    assert ngpt == llama


def test_the_configuration_can_ask_for_tuples(pair):
    for model in pair:
        model.config.return_dict = False
    llama, ngpt = (outcome(lambda m: m(IDS, labels=IDS), model) for model in pair)
    assert ngpt == llama


LAST = torch.nn.functional.pad(IDS, (0, 1), value=-100)[..., 1:].index_fill(1, torch.arange(6), -100)
ARGUMENTS = {
    "shift_labels": LAST,
    "ignore_index": 7,
    "num_items_in_batch": torch.tensor(5),
    "is_causal": False,
    "attention_mask": (torch.arange(12) > 2).long().expand(2, 12),
    "position_ids": torch.arange(12).expand(2, 12) * 3,
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_changes_llamas_loss_changes_ours(pair, name):
    changed = []
    for model in pair:
        with torch.no_grad():
            before, after = model(IDS, labels=IDS).loss, model(IDS, labels=IDS, **{name: ARGUMENTS[name]}).loss
        changed.append(abs(float(before - after)) > 1e-6)
    assert changed == [True, True]


def test_shift_labels_count_as_they_are():
    model = small()
    with torch.no_grad():
        logits = model(IDS).logits
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 61), LAST.reshape(-1))
        torch.testing.assert_close(model(IDS, labels=IDS, shift_labels=LAST).loss, expected)
        torch.testing.assert_close(model(IDS, shift_labels=LAST).loss, expected)


def test_the_cache_goes_by_both_of_its_names():
    model = small()
    with torch.no_grad():
        whole = model(IDS).logits
        for name in ("cache", "past_key_values"):
            cache = DynamicCache(config=model.config)
            model(IDS[:, :8], **{name: cache})
            rest = model(IDS[:, 8:], **{name: cache}).logits
            torch.testing.assert_close(rest, whole[:, 8:], atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="two names"):
            model(IDS, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["head_mask", "encoder_hidden_states", "token_type_ids"])
def test_an_argument_of_other_architectures_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        small()(IDS, **{name: torch.ones_like(IDS)})


@pytest.mark.parametrize("llama, ngpt, auto, labels", [
    (LlamaForSequenceClassification, NGPTForSequenceClassification, AutoModelForSequenceClassification, torch.tensor([0, 2])),
    (LlamaForTokenClassification, NGPTForTokenClassification, AutoModelForTokenClassification, IDS % 3),
])  # fmt: skip
def test_classification_heads_are_llamas(llama, ngpt, auto, labels, tmp_path):
    theirs, ours = llama(LlamaConfig(**SIZES)).eval(), ngpt(NGPTConfig(**SIZES)).eval()
    for call in (lambda m: m(IDS), lambda m: m(IDS, labels=labels), lambda m: m(IDS, output_hidden_states=True)):
        assert outcome(call, ours) == outcome(call, theirs)
    ours.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert type(again) is ngpt
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, ours(IDS).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [70, 40])
def test_a_resized_vocabulary_keeps_its_logits_stays_on_the_sphere_and_reloads(size, tied, mean, tmp_path):
    model, kept = small(tie_word_embeddings=tied, eos_token_id=[2, 50]), min(size, 61)
    with torch.no_grad():
        before = model(IDS).logits
        model.resize_token_embeddings(size, mean_resizing=mean)
        after = model(IDS).logits
        assert after.shape[-1] == size
        torch.testing.assert_close(after[..., :kept], before[..., :kept], atol=1e-6, rtol=0)
        for table in (model.model.embed_tokens.weight, model.lm_head.weight):
            torch.testing.assert_close(table.norm(dim=1), torch.ones(size))
        expected = model.sz.weight[:61].mean() if mean else torch.tensor(0.2)
        torch.testing.assert_close(model.sz.weight[61:], expected.expand(max(0, size - 61), 1))
        assert model.sz.weight.requires_grad and model.config.eos_token_id == ([2, 50] if size > 61 else [2])
        model.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path)(IDS).logits, after)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.validate()
        assert checkpoint.spec.vocab_size == size


@pytest.mark.filterwarnings("ignore")
def test_a_resized_model_builds_and_answers_as_it_did(tmp_path):
    model = small()
    model.resize_token_embeddings(64, pad_to_multiple_of=32)
    model.save_pretrained(tmp_path / "model")
    folder = build_engine(tmp_path / "model", "cpu-fp32", tmp_path / "engine", verify=False)
    with load_engine(folder) as engine, torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(engine.logits(IDS.numpy())), model(IDS).logits, atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_folded_head_grows_by_rows_of_its_own_length(tmp_path):
    small().save_pretrained(tmp_path / "plain")
    with open_checkpoint(tmp_path / "plain") as checkpoint:
        save_hf(fold_scales(checkpoint), tmp_path / "folded")
    model = load(tmp_path / "folded")
    with torch.no_grad():
        lengths = model.lm_head.weight.norm(dim=1)
        model.resize_token_embeddings(70)
        torch.testing.assert_close(model.lm_head.weight[61:].norm(dim=1), lengths.mean().expand(9))
