"""An engine ends text where transformers' generate would, whatever file says so; and it can do without a tokenizer."""

import json
import shutil

import numpy as np
import pytest
import torch

from engines import build_engine, load_engine
from engines.runtime.manifest import read_manifest
from ngpt import NGPTForCausalLM
from ngpt.errors import ConfigError, CorruptFileError, PackagingError
from scripts.cli import main
from tests.conftest import TINY, Golden
from tests.ngpt.making import tokenizer
from triton_repo import TritonServer, package_engine
from triton_repo.client import generate_tokens
from triton_repo.llmapi import package_checkpoint


def checkpoint(case, folder, **files):
    shutil.copytree(case.folder, folder, ignore=shutil.ignore_patterns("*.npz"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def continuation(case):
    """(prompt, golden greedy continuation) of the case's last row."""
    length = case.ids.shape[1]
    return case.ids[-1].tolist(), case.greedy[-1, length:].tolist()


def test_a_second_end_token_that_only_generation_config_lists_ends_the_text(tmp_path):
    case = Golden("gqa")
    prompt, expected = continuation(case)
    second = expected[7]
    folder = checkpoint(
        case, tmp_path / "model", generation_config={"eos_token_id": [255, second], "do_sample": True, "top_p": 0.9}
    )
    model = NGPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    engine = build_engine(folder, "cpu-fp32", tmp_path / "engine", verify=False)
    with load_engine(engine) as loaded:
        assert loaded.generate([prompt], max_new_tokens=24) == [theirs] == [expected[: expected.index(second) + 1]]
        assert loaded.generate([prompt], max_new_tokens=24, ignore_eos=True) == [expected]
        assert loaded.manifest.generation == {"do_sample": True, "top_p": 0.9}
    assert json.loads((engine / "genai_config.json").read_text())["model"]["eos_token_id"] == [255, second]
    repository = package_engine(engine, tmp_path / "models", allow_unverified=True)
    assert read_manifest(repository / "tensorrt_llm" / "1" / "engine").model.eos_token_ids == (255, second)


def test_build_convert_and_verify_take_a_tokenizer_and_end_tokens(tmp_path):
    case = Golden("research-checkpoint")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "tokenizer.json").write_text(tokenizer(("<|endoftext|>", "<pad>"), 90).to_str())
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    text = ["--checkpoint", str(case.folder / "ckpt.pt"), "--tokenizer", str(tmp_path / "gpt2")]
    assert main(["build", *text, "--target", "cpu-fp32", "--no-verify", "--output", str(tmp_path / "engine")]) == 0
    assert read_manifest(tmp_path / "engine").model.eos_token_ids == (90,)
    with load_engine(tmp_path / "engine") as engine:
        assert isinstance(engine.generate_text("def", max_new_tokens=4), str)
    assert main(["convert", *text, "--eos", "<pad>", "--eos", "3", "--output", str(tmp_path / "hf")]) == 0
    model = NGPTForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == [91, 3] and (tmp_path / "hf" / "tokenizer.json").is_file()
    assert main(["verify", str(tmp_path / "engine"), "--checkpoint", str(case.folder), "--decode-steps", "4"]) == 0
    report = json.loads((tmp_path / "engine" / "parity.json").read_text())
    named = [sequence["name"] for sequence in report["sequences"]]
    assert "text 0" in named, "the checkpoint has no tokenizer: the texts were read with the engine's"


@pytest.mark.parametrize("files, error", [
    ({"tokenizer": "{"}, CorruptFileError),
    ({"tokenizer": tokenizer(tuple(f"<{i}>" for i in range(80))).to_str()}, ConfigError),
    ({"tokenizer": tokenizer().to_str(), "tokenizer_config": "[]"}, CorruptFileError),
])  # fmt: skip
def test_nothing_is_built_with_a_tokenizer_that_does_not_fit(files, error, tmp_path):
    with pytest.raises(error, match="tokenizer"):
        build_engine(checkpoint(Golden("gqa"), tmp_path / "model", **files), "cpu-fp32", tmp_path / "engine", verify=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def tokens_engine(tmp_path_factory):
    """An engine without a tokenizer and without a token that ends a text."""
    folder = tmp_path_factory.mktemp("tokens")
    research = Golden("research-checkpoint")
    return build_engine(research.folder, "cpu-fp32", folder / "engine", verify=False)


def test_an_engine_without_a_tokenizer_is_served_for_tokens(tokens_engine, tmp_path):
    case = Golden("research-checkpoint")
    prompt, expected = continuation(case)
    repository = package_engine(tokens_engine, tmp_path / "models", allow_unverified=True, num_slots=2)
    assert [entry.name for entry in repository.iterdir()] == ["tensorrt_llm"]
    with TritonServer(repository, log_path=tmp_path / "log.txt", start_timeout=90) as server:
        assert generate_tokens(server.grpc_url, prompt, max_tokens=len(expected)) == expected


def test_a_tokenizer_may_come_with_the_package(tokens_engine, tmp_path):
    (tmp_path / "gpt2.json").write_text(tokenizer(size=90).to_str())
    options = {"allow_unverified": True, "tokenizer": tmp_path / "gpt2.json"}
    repository = package_engine(tokens_engine, tmp_path / "models", **options)
    for model in ("preprocessing", "postprocessing", "ensemble"):
        assert (repository / model / "1" / "tokenizer" / "tokenizer.json").is_file()
    assert read_manifest(repository / "ensemble" / "1" / "engine").model.eos_token_ids == (90,)
    assert 'string_value: "90"' in (repository / "preprocessing" / "config.pbtxt").read_text()
    named = package_engine(tokens_engine, tmp_path / "named", eos=["<|endoftext|>", 5], **options)
    assert read_manifest(named / "ensemble" / "1" / "engine").model.eos_token_ids == (90, 5)
    with pytest.raises(ConfigError, match="vocab_size"):
        package_engine(tokens_engine, tmp_path / "other", allow_unverified=True, tokenizer=TINY)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("option", [{"mount": "/elsewhere"}, {"kv_cache_fraction": 0.5}])
def test_an_option_that_the_engines_runtime_would_not_see_is_refused(option, tokens_engine, tmp_path):
    with pytest.raises(PackagingError, match=next(iter(option))):
        package_engine(tokens_engine, tmp_path / "models", allow_unverified=True, **option)
    command = ["package", str(tokens_engine), "--output", str(tmp_path / "models"), "--allow-unverified"]
    assert main([*command, "--tp", "2"]) == 2 and main([*command, "--module", "a.py"]) == 2


def test_an_option_of_an_engine_is_refused_for_a_checkpoint(tmp_path, capsys):
    command = ["package", str(TINY), "--output", str(tmp_path / "models"), "--allow-unverified"]
    for option in (["--threads", "2"], ["--mount", "/elsewhere"]):
        assert main([*command, *option]) == 2 and option[0] in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_packaged_checkpoint_states_the_ends_that_were_given(tmp_path):
    made = package_checkpoint(TINY, tmp_path / "models", allow_unverified=True, eos=["<pad>", 5])
    folder = made / "tensorrt_llm" / "1" / "checkpoint"
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == [0, 5]


def test_the_golden_text_does_not_end_early_without_end_tokens(tokens_engine):
    prompt, expected = continuation(Golden("research-checkpoint"))
    with load_engine(tokens_engine) as engine:
        np.testing.assert_array_equal(engine.generate([prompt], max_new_tokens=len(expected))[0], expected)
