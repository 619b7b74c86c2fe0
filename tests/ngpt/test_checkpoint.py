"""Both input formats, and everything that can be wrong with a checkpoint."""

import json
import os
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ngpt.checkpoint import expected_tensors, open_checkpoint, save_hf
from ngpt.checkpoint.safetensors_file import read_header
from ngpt.checkpoint.value_checks import norm_tolerance
from ngpt.errors import (
    BuildError,
    CheckpointError,
    ConfigError,
    CorruptFileError,
    DtypeError,
    MissingTensorError,
    OutputExistsError,
    ShapeError,
    TensorValueError,
    UnexpectedTensorError,
    UnsafeFormatError,
)
from tests.ngpt.making import GOLDEN, golden_tensors, write_checkpoint, write_shards

CASES = ["gqa", "gqa-left-padded", "llama3-rope-bias", "dead-mlp", "research-checkpoint", "research-train-py"]
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", CASES)
def test_golden_checkpoints_are_valid(name):
    seen = []
    with open_checkpoint(GOLDEN / name) as checkpoint:
        checkpoint.validate(progress=lambda what, done: seen.append((what, done)))
        assert set(checkpoint.names()) == set(expected_tensors(checkpoint.spec))
        assert checkpoint.digest().startswith("sha256:")
    assert len(seen) == len(checkpoint.names()) + 1 and seen[-1] == ("checked", 1.0)
    assert [done for _, done in seen] == sorted(done for _, done in seen)


def test_sharded_equals_single(tmp_path):
    single = open_checkpoint(GOLDEN / "gqa")
    folder = save_hf(single, tmp_path / "out", max_shard_bytes=200_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    sharded = open_checkpoint(folder)
    sharded.validate()
    assert sharded.names() == single.names() and sharded.spec == single.spec
    assert all(torch.equal(sharded.get(name), single.get(name)) for name in single.names())
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")], "no staging folder is left"


def test_save_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        save_hf(open_checkpoint(GOLDEN / "gqa"), tmp_path)
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_save_leaves_nothing_behind_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ngpt.checkpoint.save.save_file", full)
    with pytest.raises(BuildError, match="No space left"):
        save_hf(open_checkpoint(GOLDEN / "gqa"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- names, shapes, dtypes


def test_missing_tensor(tmp_path):
    tensors = golden_tensors()
    del tensors["model.layers.2.mlp_alpha"]
    with pytest.raises(MissingTensorError, match=r"model\.layers\.2\.mlp_alpha"):
        open_checkpoint(write_checkpoint(tmp_path, tensors))


def test_missing_head_names_tying_as_the_remedy(tmp_path):
    tensors = golden_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(MissingTensorError, match="tie_word_embeddings"):
        open_checkpoint(write_checkpoint(tmp_path / "a", tensors))
    open_checkpoint(write_checkpoint(tmp_path / "b", tensors, tie_word_embeddings=True)).validate()


def test_extra_tensor(tmp_path):
    tensors = golden_tensors() | {"model.norm.weight": torch.ones(64)}
    with pytest.raises(UnexpectedTensorError, match=r"model\.norm\.weight"):
        open_checkpoint(write_checkpoint(tmp_path, tensors))


@pytest.mark.parametrize("shape", [(64,), (64, 32), (1, 64, 64)])
def test_misshapen_tensor(tmp_path, shape):
    with pytest.raises(ShapeError, match=r"q_proj.*\[64, 64\]"):
        open_checkpoint(write_checkpoint(tmp_path, golden_tensors() | {Q0: torch.zeros(shape)}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_wrong_dtype(tmp_path, dtype):
    tensors = golden_tensors() | {Q0: torch.zeros(64, 64).to(dtype)}
    with pytest.raises(DtypeError, match="q_proj"):
        open_checkpoint(write_checkpoint(tmp_path, tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_valid(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in golden_tensors().items()}
    open_checkpoint(write_checkpoint(tmp_path, tensors)).validate()


def test_config_of_another_model(tmp_path):
    with pytest.raises(ConfigError, match="not an nGPT checkpoint"):
        open_checkpoint(write_checkpoint(tmp_path, model_type="llama"))


# --- values


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [Q0, "model.layers.1.attn_alpha", "sz.weight"])
def test_values_that_are_not_finite(tmp_path, name, value):
    tensors = golden_tensors()
    tensors[name].view(-1)[7] = value
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    with pytest.raises(TensorValueError, match=f"{name}.*not finite"):
        checkpoint.validate()


MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("part", [f"self_attn.{m}" for m in MATRICES] + ["mlp.up_proj", "mlp.down_proj"])
def test_matrices_that_are_not_unit_norm(tmp_path, part):
    name = f"model.layers.1.{part}.weight"
    tensors = golden_tensors()
    column = part.endswith(("o_proj", "down_proj"))
    (tensors[name][:, 5] if column else tensors[name][5])[:] *= 1.02
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    with pytest.raises(TensorValueError, match=f"{part}.*not unit norm: {'column' if column else 'row'} 5, 1 "):
        checkpoint.validate()


def test_a_zero_embedding_has_no_direction(tmp_path):
    tensors = golden_tensors()
    tensors["model.embed_tokens.weight"][3] = 0
    with pytest.raises(TensorValueError, match="embed_tokens.*row 3"):
        open_checkpoint(write_checkpoint(tmp_path, tensors)).validate()


def test_tolerance_is_that_of_the_storage_dtype(tmp_path):
    assert norm_tolerance(torch.float32, 64) < 1e-5 < norm_tolerance(torch.bfloat16, 64) < 0.01
    narrow = {name: tensor.bfloat16().float() for name, tensor in golden_tensors().items()}
    open_checkpoint(write_checkpoint(tmp_path / "wide", narrow)).validate()  # bfloat16 values in a float32 file
    narrow[Q0] = (narrow[Q0] * 1.02).bfloat16()
    with pytest.raises(TensorValueError, match="bfloat16 rounding"):
        open_checkpoint(write_checkpoint(tmp_path / "off", narrow)).validate()


def test_norms_are_right_when_a_matrix_is_read_in_blocks(monkeypatch):
    monkeypatch.setattr("ngpt.checkpoint.value_checks._BLOCK", 100)
    open_checkpoint(GOLDEN / "dead-mlp").validate()


def test_tied_but_different_head(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tie_word_embeddings=True))
    with pytest.raises(TensorValueError, match="lm_head"):
        checkpoint.validate()


# --- files


@pytest.mark.parametrize("keep", [4, 500, 300_000])
def test_truncated_file(tmp_path, keep):
    folder = write_checkpoint(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CorruptFileError, match="truncated"):
        open_checkpoint(folder)


def header_file(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


HOSTILE = {
    "not json": b"\xff\xfe\x00",
    "deep json": b"[" * 100_000,
    "a list": [],
    "negative shape": {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
    "huge shape": {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
    "bytes and shape disagree": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
    "hole": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}},
    "overlap": {
        "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    },
    "trailing bytes": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},
    "unknown dtype": {"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 4]}},
    "no offsets": {"a": {"dtype": "U8", "shape": [4]}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header(tmp_path, case):
    with pytest.raises(CorruptFileError):
        read_header(header_file(tmp_path / "x.safetensors", HOSTILE[case], b"1234"))


def test_header_length_beyond_the_formats_limit(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CorruptFileError, match="not a safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_duplicate_name_in_one_header(tmp_path):
    entry = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    raw = f'{{"a":{entry},"a":{entry}}}'.encode()
    with pytest.raises(UnexpectedTensorError, match="'a' twice"):
        read_header(header_file(tmp_path / "x.safetensors", raw, b"1234"))


@pytest.mark.parametrize("text", ["{", "[]", '{"a": NaN}', "\ufeffx"])
def test_config_that_is_not_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CorruptFileError):
        open_checkpoint(tmp_path)


def halves():
    tensors = golden_tensors()
    names = sorted(tensors)
    return [{n: tensors[n] for n in names[:10]}, {n: tensors[n] for n in names[10:]}]


@pytest.mark.parametrize(
    "target",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", ".x.safetensors", "x"],
)
def test_index_with_a_hostile_path(tmp_path, target):
    with pytest.raises(UnsafeFormatError, match="unsafe path"):
        open_checkpoint(write_shards(tmp_path, halves(), {Q0: target}))


def test_index_that_leads_to_a_missing_shard(tmp_path):
    folder = write_shards(tmp_path, halves())
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(MissingTensorError, match=r"shard model-1\.safetensors"):
        open_checkpoint(folder)


def test_index_and_shards_that_disagree(tmp_path):
    first, second = halves()
    name = next(iter(first))
    with pytest.raises(UnexpectedTensorError, match="does not place there"):
        open_checkpoint(write_shards(tmp_path / "moved", [first, second], {name: "model-1.safetensors"}))
    with pytest.raises(MissingTensorError, match="ghost"):
        open_checkpoint(write_shards(tmp_path / "ghost", [first, second], {"ghost": "model-1.safetensors"}))


def test_tensor_in_two_shards(tmp_path):
    first, second = halves()
    name = next(iter(first))
    with pytest.raises(UnexpectedTensorError):
        open_checkpoint(write_shards(tmp_path, [first, second | {name: first[name].clone()}]))


def test_single_and_sharded_side_by_side(tmp_path):
    write_shards(tmp_path, halves())
    save_file(golden_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="both"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_bin_files_are_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"x")
    with pytest.raises(UnsafeFormatError, match="run code"):
        open_checkpoint(folder)


def test_places_without_a_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    with pytest.raises(UnsafeFormatError):
        open_checkpoint(tmp_path / "model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ngpt"}))
    with pytest.raises(MissingTensorError, match="no weights"):
        open_checkpoint(tmp_path)


# --- the research format


def research(tmp_path, change=None):
    stored = torch.load(GOLDEN / "research-checkpoint" / "ckpt.pt", weights_only=True)
    if change is not None:
        change(stored)
    torch.save(stored, tmp_path / "ckpt.pt")
    return tmp_path


def test_compiled_prefix_is_stripped(tmp_path):
    def prefix(stored):
        stored["model"] = {"_orig_mod." + name: tensor for name, tensor in stored["model"].items()}

    open_checkpoint(research(tmp_path, prefix) / "ckpt.pt").validate()


def test_research_biases_and_optimizer_state_are_accepted(tmp_path):
    def with_bias(stored):
        stored["optimizer"] = {"state": {}}
        stored["model_args"]["bias"] = True
        for name, tensor in list(stored["model"].items()):
            if tensor.ndim == 2 and "transformer.h" in name:
                stored["model"][name.replace("weight", "bias")] = torch.zeros(tensor.shape[0])

    checkpoint = open_checkpoint(research(tmp_path, with_bias))
    checkpoint.validate()
    assert checkpoint.spec.mlp_bias and "model.layers.0.mlp.gate_proj.bias" in checkpoint.names()


RESEARCH_BAD = {
    "baseline": (lambda s: s["model_args"].update(use_nGPT=0), ConfigError),
    "unknown argument": (lambda s: s["model_args"].update(n_expert=8), ConfigError),
    "no base_scale": (lambda s: s["model_args"].pop("base_scale"), ConfigError),
    "text size": (lambda s: s["model_args"].update(n_embd="64"), ConfigError),
    "no model_args": (lambda s: s.pop("model_args"), CheckpointError),
    "missing": (lambda s: s["model"].pop("sz"), MissingTensorError),
    "extra": (lambda s: s["model"].update(extra=torch.ones(1)), UnexpectedTensorError),
    "misshapen": (lambda s: s["model"].update(sz=torch.ones(9)), ShapeError),
    "integers": (lambda s: s["model"].update(sz=torch.ones(256, dtype=torch.int32)), DtypeError),
    "twice": (lambda s: s["model"].update({"_orig_mod.sz": s["model"]["sz"]}), UnexpectedTensorError),
    "not a tensor": (lambda s: s["model"].update(sz=3), CheckpointError),
    "scalar": (lambda s: s["model"].update({"transformer.h.0.c_fc.weight": torch.tensor(1.0)}), ShapeError),
}


@pytest.mark.parametrize("case", RESEARCH_BAD)
def test_bad_research_checkpoint(tmp_path, case):
    change, kind = RESEARCH_BAD[case]
    with pytest.raises(kind):
        open_checkpoint(research(tmp_path, change))


@pytest.mark.parametrize("keep", [0, 100, 200_000])
def test_truncated_research_checkpoint(tmp_path, keep):
    data = (GOLDEN / "research-checkpoint" / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(data[:keep])
    with pytest.raises(CorruptFileError):
        open_checkpoint(tmp_path)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, legacy):
    marker = tmp_path / "owned"
    if legacy:
        (tmp_path / "ckpt.pt").write_bytes(pickle.dumps({"model": Attack(marker)}))
    else:
        torch.save({"model": Attack(marker)}, tmp_path / "ckpt.pt")
    with pytest.raises(UnsafeFormatError):
        open_checkpoint(tmp_path)
    assert not marker.exists()


def test_opening_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None; import ngpt.checkpoint, ngpt.weights; "
        "c = ngpt.checkpoint.open_checkpoint(sys.argv[1]); c.validate(); ngpt.weights.Weights(c).get('embed')"
    )
    root = GOLDEN.parent.parent
    subprocess.run([sys.executable, "-c", code, str(GOLDEN / "gqa")], check=True, cwd=root)
