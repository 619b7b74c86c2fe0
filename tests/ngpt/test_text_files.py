"""Tokenizer and generation files beside the weights: what is found, what is refused, and at which tokens text ends."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers

from ngpt import NGPTForCausalLM
from ngpt.checkpoint import open_checkpoint, save_hf
from ngpt.errors import CheckpointError, ConfigError, CorruptFileError
from tests.conftest import GOLDEN, TINY
from tests.ngpt.making import tokenizer


def copy(name, tmp_path, **files):
    """A golden checkpoint with further files: dicts as JSON, the rest as it is."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / name, folder)
    for key, value in files.items():
        text = value.to_str() if isinstance(value, Tokenizer) else value if isinstance(value, str) else json.dumps(value)
        (folder / f"{key}.json").write_text(text)
    return folder


@pytest.mark.parametrize("generation, ends", [
    ({"eos_token_id": [2, 7]}, (2, 7)), ({"eos_token_id": 7}, (7,)), ({"eos_token_id": None}, ()), ({"eos_token_id": [7, 7, -1]}, (7,)),
    ({"temperature": 0.6}, (2,)), ({}, (2,)),
])  # fmt: skip
def test_text_ends_where_transformers_generate_would_end_it(generation, ends, tmp_path):
    folder = copy("gqa", tmp_path, generation_config=generation)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.spec.eos_token_ids == ends
    if "eos_token_id" in generation:
        theirs = NGPTForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        assert {token for token in np.atleast_1d(theirs or []) if token >= 0} == set(ends)


def test_sampling_settings_are_read_and_checked(tmp_path):
    stated = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "5.24.0", "min_p": None}
    with open_checkpoint(copy("gqa", tmp_path, generation_config=stated)) as checkpoint:
        assert checkpoint.text.sampling == {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize("wrong", [
    {"temperature": "hot"}, {"top_p": 1.5}, {"top_k": -4}, {"do_sample": 1}, {"eos_token_id": "</s>"}, {"eos_token_id": [True]},
    {"eos_token_id": 256}, {"top_k": 10**400}, {"top_k": 2.5}, {"eos_token_id": 2.5},
])  # fmt: skip
def test_wrong_generation_settings_are_named(wrong, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        open_checkpoint(copy("gqa", tmp_path, generation_config=wrong))


@pytest.mark.parametrize("files", [
    {"tokenizer_config": {"eos_token": "<end>"}},
    {"tokenizer_config": {"eos_token": {"content": "<end>", "lstrip": False}}},
    {"special_tokens_map": {"eos_token": "<end>"}},
    {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": {"content": "<end>"}}},
])  # fmt: skip
def test_a_research_model_ends_where_its_tokenizer_says(files, tmp_path):
    with open_checkpoint(
        copy("research-checkpoint", tmp_path, tokenizer=tokenizer(("<pad>", "<end>"), 90), **files)
    ) as checkpoint:
        assert checkpoint.spec.eos_token_ids == (91,)
        save_hf(checkpoint, tmp_path / "saved")
    with open_checkpoint(tmp_path / "saved") as again:
        assert again.spec.eos_token_ids == (91,) and again.config["eos_token_id"] == [91]


def test_gpt2s_tokenizer_without_configuration_ends_text_at_its_one_special_token(tmp_path):
    with open_checkpoint(copy("research-checkpoint", tmp_path, tokenizer=tokenizer(size=90))) as checkpoint:
        assert checkpoint.spec.eos_token_ids == (90,) and "<|endoftext|>" in " ".join(checkpoint.notes)
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer(("<|endoftext|>", "</s>"), 90).to_str())
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.spec.eos_token_ids == () and "--eos" in " ".join(checkpoint.notes)


def test_ends_that_are_given_count_alone_and_are_written_everywhere(tmp_path):
    folder = copy("gqa", tmp_path, tokenizer=tokenizer(("<end>",)), generation_config={"eos_token_id": 5, "top_k": 3})
    with open_checkpoint(folder, eos=["<end>", 9, "11"]) as checkpoint:
        assert checkpoint.spec.eos_token_ids == (200, 9, 11)
        save_hf(checkpoint, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == {"eos_token_id": [200, 9, 11], "top_k": 3}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["eos_token_id"] == [200, 9, 11]
    for wrong in ("<stop>", 256, "-1", "--1", "9" * 5000):
        with pytest.raises(ConfigError, match="eos"):
            open_checkpoint(folder, eos=[wrong])
    with pytest.raises(ConfigError, match="--eos"):
        open_checkpoint(folder, eos=["\ud800"])
    with pytest.raises(ConfigError, match="tokenizer"):
        open_checkpoint(GOLDEN / "gqa", eos=["<end>"])


@pytest.mark.parametrize("damage", ["", "{}", "[1, 2]", "not json", '{"version": "1.0", "model": {"type": "BPE"}}', "\x00" * 100])
def test_a_damaged_tokenizer_is_refused_before_anything_is_built(damage, tmp_path):
    with (
        open_checkpoint(copy("gqa", tmp_path, tokenizer=damage)) as checkpoint,
        pytest.raises(CorruptFileError, match="tokenizer.json"),
    ):
        checkpoint.validate()


def test_what_the_library_says_of_a_hostile_tokenizer_is_one_line(tmp_path):
    with open_checkpoint(copy("gqa", tmp_path, tokenizer=r'{"version": "\u001b[31m\nx"}')) as checkpoint:
        with pytest.raises(CorruptFileError) as caught:
            checkpoint.validate()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens"])
@pytest.mark.parametrize("damage", ["", "[]", '"text"', '{"a": 1', '{"a": 1e999}'])
def test_damaged_files_beside_it_are_too(name, damage, tmp_path):
    folder = copy("gqa", tmp_path, tokenizer=tokenizer(), **{name: damage})
    with pytest.raises(CorruptFileError, match=name):
        with open_checkpoint(folder) as checkpoint:
            checkpoint.validate()


def test_ids_that_the_models_table_lacks_are_refused(tmp_path):
    many = tokenizer(tuple(f"<{i}>" for i in range(60)))
    with open_checkpoint(copy("gqa", tmp_path, tokenizer=many)) as checkpoint, pytest.raises(ConfigError, match="256") as caught:
        checkpoint.validate()
    assert "4 above, up to 259 for '<59>'" in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "generation_config.json"])
def test_files_too_large_to_be_what_they_are_called_are_refused_and_not_copied(name, tmp_path):
    folder = copy("gqa", tmp_path)
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(CorruptFileError, match="too large"):
        open_checkpoint(folder)


def added(entry):
    """The tokenizer with one more token, written by hand."""
    written = json.loads(tokenizer().to_str())
    written["added_tokens"].append(written["added_tokens"][0] | {"content": "<x>"} | entry)
    return json.dumps(written)


@pytest.mark.parametrize("files", [
    {"tokenizer": added({"id": 5000})}, {"added_tokens": {"<x>": 5000}},
    {"tokenizer_config": {"added_tokens_decoder": {"5000": {"content": "<x>"}, "200": {"content": "<|endoftext|>"}}}},
])  # fmt: skip
def test_added_tokens_that_the_models_table_lacks_are_refused_wherever_they_stand(files, tmp_path):
    with open_checkpoint(copy("gqa", tmp_path, **({"tokenizer": tokenizer()} | files))) as checkpoint:
        with pytest.raises(ConfigError, match=r"vocab_size \(256\).* up to 5000"):
            checkpoint.validate()


def test_an_added_token_that_the_library_would_give_another_id_is_refused(tmp_path):
    with open_checkpoint(copy("gqa", tmp_path, tokenizer=added({"id": 250}))) as checkpoint:
        with pytest.raises(CorruptFileError, match="'<x>': expected the id 201, the next free one, found 250"):
            checkpoint.validate()
    with open_checkpoint(copy("gqa", tmp_path / "right", tokenizer=added({"id": 201}))) as checkpoint:
        checkpoint.validate()


def test_byte_order_marks_are_passed_over_and_not_written_again(tmp_path):
    files = {"tokenizer": tokenizer().to_str(), "tokenizer_config": "{}", "generation_config": '{"eos_token_id": 7}'}
    with open_checkpoint(copy("gqa", tmp_path, **{name: "\ufeff" + text for name, text in files.items()})) as checkpoint:
        checkpoint.validate()
        assert checkpoint.spec.eos_token_ids == (7,)
        save_hf(checkpoint, tmp_path / "saved")
    for name, text in files.items():
        assert (tmp_path / "saved" / f"{name}.json").read_text(encoding="utf-8") == text


def test_whole_numbers_among_generation_settings_may_have_a_point(tmp_path):
    with open_checkpoint(copy("gqa", tmp_path, generation_config={"eos_token_id": [7.0], "top_k": 20.0})) as checkpoint:
        assert checkpoint.spec.eos_token_ids == (7,) and checkpoint.text.sampling == {"top_k": 20}


def test_a_vocabulary_padded_beyond_the_tokenizer_is_fine(tmp_path):
    with open_checkpoint(copy("gqa", tmp_path, tokenizer=tokenizer(size=150))) as checkpoint:
        checkpoint.validate()


def test_a_tokenizer_that_knows_no_text_is_refused(tmp_path):
    empty = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    with open_checkpoint(copy("gqa", tmp_path, tokenizer=empty)) as checkpoint, pytest.raises(CorruptFileError):
        checkpoint.validate()


def test_another_tokenizer_takes_the_place_of_the_checkpoints(tmp_path):
    folder = copy("gqa", tmp_path, tokenizer="damaged", tokenizer_config={"x": 1}, generation_config={"eos_token_id": 5})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "gpt2.json").write_text(tokenizer().to_str())
    with open_checkpoint(folder, tokenizer=tmp_path / "other" / "gpt2.json") as checkpoint:
        checkpoint.validate()
        save_hf(checkpoint, tmp_path / "saved")
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="save_pretrained"):
        open_checkpoint(folder, tokenizer=tmp_path / "other")
    with pytest.raises(CheckpointError):
        open_checkpoint(folder, tokenizer=tmp_path / "nothing")
    with open_checkpoint(folder, tokenizer=TINY) as checkpoint, pytest.raises(ConfigError, match="vocab_size"):
        checkpoint.validate()


def test_copies_are_for_every_transformers(tmp_path):
    config = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<a>"]}
    with open_checkpoint(copy("gqa", tmp_path, tokenizer=tokenizer(), tokenizer_config=config)) as checkpoint:
        save_hf(checkpoint, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "backend": "tokenizers", "additional_special_tokens": ["<a>"]
    }  # fmt: skip


def test_the_examples_tokenizer_loads_in_every_transformers():
    from transformers import AutoTokenizer

    assert json.loads((TINY / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(TINY)("def main():").input_ids == [455, 1707, 827]


def test_a_tokenizer_that_would_grow_a_text_without_bound_is_refused_at_once(tmp_path):
    bomb = tokenizer()
    bomb.normalizer = normalizers.Sequence([normalizers.Replace("e", "e" * 10) for _ in range(9)])
    with (
        open_checkpoint(copy("gqa", tmp_path, tokenizer=bomb)) as checkpoint,
        pytest.raises(CorruptFileError, match="1e\\+09 times"),
    ):
        checkpoint.validate()
    bomb.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    (tmp_path / "model" / "tokenizer.json").write_text(bomb.to_str())
    with open_checkpoint(tmp_path / "model") as checkpoint:
        checkpoint.validate()
