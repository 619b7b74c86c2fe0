"""Research checkpoints as trainings write them, and as somebody hostile would: `ngpt/checkpoint/torch_file.py`."""

import argparse
import collections
import dataclasses
import datetime
import json
import pathlib
import random
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from ngpt.checkpoint import open_checkpoint, save_hf
from ngpt.errors import CheckpointError, ConfigError
from tests.conftest import GOLDEN
from tests.ngpt.making import private_bytes, research, save, write_archive

TRAINED = GOLDEN / "research-train-py" / "ckpt.pt"
WTE = "transformer.wte.weight"


@pytest.fixture
def stored():
    return research()


def test_a_file_of_the_training_script_is_read_and_nothing_is_imported(monkeypatch):
    class Trap:
        def find_spec(self, name, *_):
            assert name.split(".")[0] not in ("model", "__main__"), f"{name} was imported"

    monkeypatch.setattr(sys, "meta_path", [Trap(), *sys.meta_path])
    with open_checkpoint(TRAINED) as checkpoint:
        checkpoint.validate()
        assert checkpoint.spec.max_length == 64 and checkpoint.spec.position == "research"
        assert checkpoint.info("model.embed_tokens.weight").dtype == "F32"
        assert checkpoint.info("model.layers.0.self_attn.q_proj.weight").dtype == "BF16"
    assert "model" not in sys.modules


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpys_random_state_is_passed_over_in_both_spellings(core, tmp_path):
    """NumPy 1 writes numpy.core, NumPy 2 numpy._core: the golden file has the first."""
    with zipfile.ZipFile(TRAINED) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    old, new = b"cnumpy.core.multiarray\n", f"cnumpy.{core}.multiarray\n".encode()
    pickled = next(name for name in members if name.endswith("data.pkl"))
    assert old in members[pickled]
    write_archive(tmp_path / "ckpt.pt", members | {pickled: members[pickled].replace(old, new)})
    open_checkpoint(tmp_path).validate()


@dataclasses.dataclass
class GPTConfig:
    n_layer: int = 2
    where: pathlib.PurePath = pathlib.PurePosixPath("out")


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    n_layer: int = 2


class Settings(dict):
    pass


class Attributes(dict):
    """As EasyDict, Munch and Box: entries are attributes."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__ = self


class Marked(dict):
    """As addict's Dict and yacs' CfgNode: attributes of its own beside the entries."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.frozen = True


class Several(list):
    pass


class Pair(collections.namedtuple("Pair", "a b")):
    pass


CONFIGS = {
    "a dict": {"out_dir": "out", "lr": 1e-3, "none": None, "big": 2**70, "nested": {"a": [1, (2, 3)]}},
    "a namespace": argparse.Namespace(lr=1e-3, path=pathlib.Path("data")),
    "a dataclass": GPTConfig(),
    "a slotted dataclass": Slotted(),
    "a class filled like a dict": Settings(lr=1e-3),
    "a dict whose entries are attributes": Attributes(lr=1e-3, inner=Attributes(a=1)),
    "a dict with attributes": Marked(lr=1e-3, inner=Marked(a=1)),
    "a class filled like a list": Several([1, 2]),
    "a named tuple": Pair(1, 2),
    "a defaultdict": collections.defaultdict(list, {"loss": [1.0]}),
    "an OrderedDict": collections.OrderedDict(a=1),
    "a Counter": collections.Counter("aab"),
    "a deque": collections.deque([1, 2], maxlen=3),
    "a simple namespace": types.SimpleNamespace(lr=1e-3),
    "sets and bytes": [{1, 2}, frozenset("ab"), b"x\xff", bytearray(b"y"), 3j, slice(1, 2), range(3)],
    "times": [datetime.datetime(2026, 1, 2), datetime.timedelta(1), datetime.date(2026, 1, 2)],
    "torch": [
        torch.device("cuda", 0),
        torch.bfloat16,
        torch.Size([2, 3]),
        torch.get_rng_state(),
        torch.nn.Parameter(torch.ones(2)),
    ],
    "numpy": [np.float32(1), np.int64(2), np.arange(3), np.zeros((2, 2), "f2"), np.dtype("i4"), np.random.default_rng(0)],
    "bit generators": [getattr(np.random, name)(0) for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")],
    "a random state": np.random.RandomState(0),
    "random": [random.getstate(), random.Random(1)],
    "a class": GPTConfig,
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_trainings_keep_beside_the_weights_is_passed_over(case, stored, tmp_path):
    stored |= {
        "config": CONFIGS[case],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}},
        "best_val_loss": torch.tensor(1.5),
    }
    open_checkpoint(save(stored, tmp_path)).validate()


@pytest.mark.parametrize("module", ["model", "__main__", "nanogpt.model", "a_module_that_is_nowhere"])
def test_the_configuration_class_may_come_from_any_module(module, stored, tmp_path, monkeypatch):
    theirs = types.ModuleType(module)
    theirs.Theirs = type("Theirs", (), {"__module__": module})
    instance = theirs.Theirs()
    instance.n_layer = 2
    with monkeypatch.context() as patch:
        for name in (module.partition(".")[0], module):
            patch.setitem(sys.modules, name, theirs)
        save(stored | {"config": instance}, tmp_path)
    open_checkpoint(tmp_path).validate()


PREFIXES = ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_stripped_in_any_order(prefix, stored, tmp_path):
    stored["model"] = {prefix + name: tensor for name, tensor in stored["model"].items()}
    open_checkpoint(save(stored, tmp_path)).validate()


NUMBERS = {
    "NumPy's": {"n_layer": np.int64(3), "n_head": np.uint8(4), "base_scale": np.float64(0.125), "bias": np.bool_(False), "use_nGPT": np.int32(1)},
    "written with a point": {"n_layer": 3.0, "vocab_size": 256.0, "use_nGPT": 1.0},
    "beside a null": {"n_kv_head": None},
}  # fmt: skip


@pytest.mark.parametrize("case", NUMBERS)
def test_sizes_may_be_numbers_of_other_kinds(case, stored, tmp_path):
    plain = open_checkpoint(save(stored, tmp_path)).config
    assert (plain["num_hidden_layers"], plain["initializer_range"]) == (3, 0.125)
    stored["model_args"] |= NUMBERS[case]
    checkpoint = open_checkpoint(save(stored, tmp_path))
    checkpoint.validate()
    assert checkpoint.config == plain and json.dumps(checkpoint.config) == json.dumps(plain)


def test_a_number_of_numpys_that_does_not_fit_its_type_is_named(stored, tmp_path):
    class Wrong:
        def __reduce__(self):
            return np.float64(1).__reduce__()[0], (np.dtype("f8"), b"abc")

    stored["model_args"]["base_scale"] = Wrong()
    with pytest.raises(ConfigError, match="model_args.base_scale"):
        open_checkpoint(save(stored, tmp_path))


def test_model_args_of_another_kind_are_said_to_be(stored, tmp_path):
    stored["model_args"] = argparse.Namespace(**stored["model_args"])
    with pytest.raises(CheckpointError, match="'model_args': argparse.Namespace"):
        open_checkpoint(save(stored, tmp_path))


def test_a_wrapper_around_each_layer_is_stripped_too(stored, tmp_path):
    stored["model"] = {
        name.replace("transformer.h.0.", "transformer.h.0._orig_mod."): tensor for name, tensor in stored["model"].items()
    }
    open_checkpoint(save(stored, tmp_path)).validate()


def test_a_permuted_tensor_keeps_its_values(stored, tmp_path):
    table = stored["model"][WTE]
    stored["model"][WTE] = table.t().contiguous().t()
    with open_checkpoint(save(stored, tmp_path)) as checkpoint:
        assert not checkpoint.get("model.embed_tokens.weight").is_contiguous()
        folder = save_hf(checkpoint, tmp_path / "out")
    assert torch.equal(open_checkpoint(folder).get("model.embed_tokens.weight"), table)


def test_the_rest_of_the_file_costs_no_memory(stored, tmp_path):
    stored["optimizer"] = {"state": {0: {"exp_avg": torch.ones(64 << 20)}}}
    path = save(stored, tmp_path)
    assert path.stat().st_size > 256 << 20
    before = private_bytes()
    with open_checkpoint(path) as checkpoint:
        checkpoint.validate()
        assert private_bytes() - before < 32 << 20
