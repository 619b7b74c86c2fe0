"""Checkpoint folders as people bring them: links, pointers, ids of a hub, odd names; and which of them are refused."""

import contextlib
import json
import os
import socket
import time

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engines.parity import verify
from ngpt.checkpoint import open_checkpoint, save_hf
from ngpt.errors import CheckpointError, ConfigError, CorruptFileError, NGPTDeployError, UnexpectedTensorError, UnsafeFormatError
from tests.doubles.torch_reference import TorchReference, loadable_folder
from tests.doubles.torch_runner import TorchRunner
from tests.ngpt.making import GOLDEN, golden_config, golden_tensors, tokenizer, write_checkpoint, write_shards

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 16000000000\n"
FILES = ("config.json", "model.safetensors")


def cached(tmp_path):
    """A folder of the Hugging Face cache: the snapshot's files are links into blobs."""
    repository = tmp_path / "hub" / "models--nvidia--ngpt"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0f3a"
    write_checkpoint(blobs)
    (blobs / "tokenizer.json").write_text(tokenizer().to_str())
    snapshot.mkdir(parents=True)
    for name in (*FILES, "tokenizer.json"):
        (blobs / name).rename(blobs / f"{name}-hash")
        (snapshot / name).symlink_to(f"../../blobs/{name}-hash")
    return snapshot


def test_a_snapshot_of_the_hub_cache_is_read_also_through_a_link_to_it(tmp_path):
    snapshot = cached(tmp_path)
    (tmp_path / "model").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "model"):
        with open_checkpoint(path) as checkpoint:
            checkpoint.validate()
            assert list(checkpoint.text.files) == ["tokenizer.json"]


def test_a_snapshots_subfolder_is_read(tmp_path):
    snapshot = cached(tmp_path)
    inner = snapshot / "last"
    inner.mkdir()
    for name in FILES:
        (inner / name).symlink_to(f"../../../blobs/{name}-hash")
    open_checkpoint(inner).validate()


def test_the_caches_own_folder_is_answered_with_the_snapshot(tmp_path):
    snapshot = cached(tmp_path)
    with pytest.raises(CheckpointError, match=f"point at {snapshot}"):
        open_checkpoint(snapshot.parent.parent)


def test_links_inside_the_folder_are_followed(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "a.safetensors")
    (folder / "model.safetensors").symlink_to("weights/a.safetensors")
    open_checkpoint(folder).validate()


OUTSIDE = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_link_to_a_file_outside_is_refused(name, tmp_path):
    folder, secret = write_checkpoint(tmp_path / "model"), tmp_path / "secret"
    if (folder / name).exists():
        (folder / name).rename(secret)
    else:
        secret.write_text("{}")
    (folder / name).symlink_to(secret)
    with pytest.raises(UnsafeFormatError, match=rf"{name} is a link that leaves its folder"):
        open_checkpoint(folder)


def test_a_shard_or_a_ckpt_that_links_outside_is_refused(tmp_path):
    tensors = golden_tensors()
    folder = write_shards(tmp_path / "model", [tensors])
    (folder / "model-0.safetensors").rename(tmp_path / "shard")
    (folder / "model-0.safetensors").symlink_to("../shard")
    with pytest.raises(UnsafeFormatError, match="leaves its folder"):
        open_checkpoint(folder)
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "ckpt.pt").symlink_to(GOLDEN / "research-checkpoint" / "ckpt.pt")
    with pytest.raises(UnsafeFormatError, match="leaves its folder"):
        open_checkpoint(tmp_path / "research")
    open_checkpoint(tmp_path / "research" / "ckpt.pt").validate()  # named by the user, and not by a folder from elsewhere


def test_another_models_blobs_are_outside(tmp_path):
    snapshot = cached(tmp_path)
    other = tmp_path / "hub" / "models--a--b" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    (snapshot / "tokenizer_config.json").symlink_to(other / "x")
    with pytest.raises(UnsafeFormatError, match="leaves its folder"):
        open_checkpoint(snapshot)


def test_blobs_that_are_a_link_to_elsewhere_are_outside(tmp_path):
    snapshot = cached(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFormatError, match="leaves its folder"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_links_that_loop_or_lead_to_nothing_are_typed_errors(name, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    for target in (name, "nothing"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(folder)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop"):
        open_checkpoint(tmp_path / "loop")


def pipe(path):
    os.mkfifo(path)


def listening(path):
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:  # its path may have 107 bytes
        server.bind(path.name)


def device(path):
    path.symlink_to("/dev/zero")


def folder_of_that_name(path):
    path.mkdir()


@pytest.mark.parametrize("make", [pipe, listening, device, folder_of_that_name])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json"])
def test_what_is_no_file_is_refused_and_not_waited_for(name, make, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(folder)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("make", [pipe, listening])
def test_a_checkpoint_that_is_no_file_is_refused_and_not_waited_for(make, tmp_path):
    make(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="ckpt.pt"):
        open_checkpoint(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="ckpt.pt"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="device"):
        open_checkpoint("/dev/zero")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_called_one(name, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(POINTER)
    with pytest.raises(CorruptFileError, match=rf"{name} is a git-LFS pointer.*git lfs pull.*{folder}"):
        open_checkpoint(folder)


def test_a_pointer_or_a_web_page_in_place_of_other_files_is_called_what_it_is(tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(POINTER)
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        with pytest.raises(CorruptFileError, match="git-LFS pointer"):
            open_checkpoint(path)
    (tmp_path / "ckpt.pt").write_bytes(b"<!DOCTYPE html><html>Sign in")
    with pytest.raises(CorruptFileError, match="web page"):
        open_checkpoint(tmp_path)
    shards = write_shards(tmp_path / "shards", [golden_tensors()])
    (shards / "model-0.safetensors").write_bytes(POINTER)
    with pytest.raises(CorruptFileError, match="model-0.safetensors is a git-LFS pointer"):
        open_checkpoint(shards)


HUB = "nvidia/Normalized-Nemotron-8B-Reasoning"


@pytest.mark.parametrize(
    "given",
    [
        HUB, HUB + "/", f"https://huggingface.co/{HUB}", f"https://huggingface.co/{HUB}/tree/main", f"hf://{HUB}", f"{HUB}@main",
        f"HTTPS://HuggingFace.co/{HUB}?library=transformers", f"https://huggingface.co/{HUB}/resolve/main/config.json", f" {HUB} ",
        f"hf://{HUB}@main/config.json", f"https://huggingface.co/{HUB}#use", "models--" + HUB.replace("/", "--"),
    ],
)  # fmt: skip
def test_an_id_of_the_hub_is_answered_with_the_command_that_downloads_it(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(given)
    assert f"hf download {HUB} --local-dir Normalized-Nemotron-8B-Reasoning" in str(caught.value)
    with pytest.raises(CheckpointError, match=f"there is no tokenizer at .*hf download {HUB} "):
        open_checkpoint(GOLDEN / "gqa", tokenizer=given)


@pytest.mark.parametrize("given", ["models/mine", "./a/b", "/a/b", "a/b/c", "a", "--x/y", "a/.."])
def test_other_paths_to_nothing_are_not_taken_for_ids_of_the_hub(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(given)
    assert "there is no checkpoint" in str(caught.value) and "hf download" not in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "y" * 5000, "\ud800", "é" * 200, ""])
def test_impossible_paths_are_typed_errors(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 6000


NAMES = {"300 characters": "x" * 300, "lone surrogates": "\ud800", "long in bytes": "é" * 150, "escape codes": "\x1b[2J"}


@pytest.mark.parametrize("case", NAMES)
def test_impossible_names_in_an_index_are_typed_errors(case, tmp_path):
    name, tensors = NAMES[case], golden_tensors()
    for weight_map in ({name: "model-0.safetensors"}, {next(iter(tensors)): name + ".safetensors"}, {name: name}):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(write_shards(tmp_path / "model", [tensors], weight_map))
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", NAMES)
def test_impossible_names_of_tensors_are_typed_errors(case, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    header = {NAMES[case]: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


CONFIGS = ["1e400", "-1e999", '"\\ud800"', "[" * 1000 + "]" * 1000, "1" * 5000, '{"a": {"a": {"a": [[[[1]]]]}}}']


@pytest.mark.parametrize("value", CONFIGS)
@pytest.mark.parametrize(
    "key",
    ["hidden_size", "rope_theta", "initializer_range", "hidden_act", "rope_scaling", "eos_token_id", "temperature", "model_type"],
)
def test_impossible_values_in_a_config_are_typed_errors_or_harmless(key, value, tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    config = {name: entry for name, entry in golden_config().items() if name != key}
    (folder / "config.json").write_text(json.dumps(config)[:-1] + f', "{key}": {value}}}')
    try:
        with open_checkpoint(folder) as checkpoint:
            save_hf(checkpoint, tmp_path / "out")
        assert key == "temperature"
    except NGPTDeployError as error:
        assert str(error).isprintable() and len(str(error)) < 1000


def test_a_byte_order_mark_is_passed_over(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())
    open_checkpoint(folder).validate()


def test_a_config_in_another_encoding_is_a_typed_error(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(golden_config()), encoding="utf-16")
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        open_checkpoint(folder)


def test_a_tensor_with_too_many_axes_is_refused_soon(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    raw = json.dumps({"a": {"dtype": "F32", "shape": [(1 << 62) + 1] * 100_000, "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    start = time.perf_counter()
    with pytest.raises(CorruptFileError, match="described badly"):
        open_checkpoint(folder)
    assert time.perf_counter() - start < 1


def test_what_is_no_ngpt_config_is_said_before_what_its_weights_lack(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="not an nGPT checkpoint"):
        open_checkpoint(tmp_path)


def halves():
    tensors = golden_tensors()
    names = sorted(tensors)
    return [{n: tensors[n] for n in names[:10]}, {n: tensors[n] for n in names[10:]}]


def wild(tmp_path):
    """Shards whose index has no metadata, and a config with what other tools leave."""
    folder = write_shards(tmp_path / "wild", halves())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["metadata"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    foreign = {"unsloth_fixed": True, "layer_types": ["full_attention"] * 3, "pad_token_id": -1, "max_position_embeddings": 512.0}
    text = json.dumps({**golden_config(), **foreign})
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder


def test_the_parity_check_loads_what_the_reader_understood(tmp_path):
    with open_checkpoint(wild(tmp_path)) as checkpoint, loadable_folder(checkpoint) as folder:
        assert sorted(file.name for file in folder.iterdir())[1:] == [
            "1.safetensors",
            "config.json",
            "model.safetensors.index.json",
        ]
        loaded = TorchReference(folder, "float32").model.state_dict()
        assert all(torch.equal(loaded[name], checkpoint.get(name)) for name in checkpoint.names())
    report = verify(TorchRunner(GOLDEN / "gqa"), wild(tmp_path), decode_steps=8)
    assert report.verdict == "pass", report.failures


def test_a_converted_folder_is_one_that_every_reader_takes(tmp_path):
    with open_checkpoint(wild(tmp_path)) as checkpoint:
        folder = save_hf(checkpoint, tmp_path / "out")
    saved = json.loads((folder / "config.json").read_text())
    assert saved["pad_token_id"] is None and saved["max_position_embeddings"] == 512 and "unsloth_fixed" not in saved
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("text", [b"Entry not found", b'{"error":"not found"}', b"# xet version 0"])
def test_a_servers_complaint_in_place_of_weights_is_shown(text, tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(text)
    with pytest.raises(CorruptFileError, match="starts with .*download the file again") as caught:
        open_checkpoint(folder)
    assert text[:8].decode() in str(caught.value)


def test_an_adapter_without_its_model_is_called_one(tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"adapter_model.safetensors\. .*merge_and_unload"):
            open_checkpoint(folder)
        (folder / "config.json").unlink(missing_ok=True)


HABITS = {
    "a dtype of no torch's": {"torch_dtype": "auto"},
    "a dtype as Python shows it": {"dtype": "torch.bfloat16"},
    "a whole number for a fraction": {"initializer_range": 1},
    "no rope type": {"rope_scaling": {"rope_type": None, "factor": None}},
    "no theta in the block": {"rope_parameters": {"rope_theta": None}},
    "tuples": {"return_dict": False, "use_return_dict": False},
    "code elsewhere": {"auto_map": {"AutoConfig": "other.Config", "AutoModelForCausalLM": "other.Model"}},
}


@pytest.mark.parametrize("case", HABITS)
def test_what_is_read_can_be_loaded_converted_and_compared(case, tmp_path):
    folder = write_checkpoint(tmp_path / "habit", **HABITS[case])
    AutoModelForCausalLM.from_pretrained(folder)
    report = verify(TorchRunner(GOLDEN / "gqa"), folder, decode_steps=1)
    assert report.verdict == "pass" or "initializer_range" in HABITS[case], report.failures
    with open_checkpoint(folder) as checkpoint:
        AutoModelForCausalLM.from_pretrained(save_hf(checkpoint, tmp_path / "out"))
        saved = json.loads((tmp_path / "out" / "config.json").read_text())
        assert "auto_map" not in saved and saved.get("dtype") in (None, "bfloat16")


def test_the_notes_are_logged_one_line_each(tmp_path, caplog):
    with open_checkpoint(wild(tmp_path)) as checkpoint:
        checkpoint.report_notes()
    lines = [record.getMessage() for record in caplog.records if record.name == "ngpt"]
    assert len(lines) == 2 and "'unsloth_fixed', 'layer_types'" in lines[0] and "pad_token_id -1" in lines[1]
    assert not any("\n" in line for line in lines)


def test_a_duplicate_key_in_a_config_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "ngpt", "' + "x" * 1000 + '": 1, "' + "x" * 1000 + '": 2}')
    with pytest.raises(UnexpectedTensorError, match="twice"):
        open_checkpoint(folder)


def test_safetensors_with_a_header_that_the_library_refuses_is_a_typed_error(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    save_file(golden_tensors(), folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length]) | {"__metadata__": {"a": 1}}
    raw = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    with open_checkpoint(folder) as checkpoint, pytest.raises(CorruptFileError, match="cannot map"):
        checkpoint.validate()
