"""Research checkpoints as somebody hostile would write them: every one ends in a short error of ours, soon, in little memory."""

import argparse
import collections
import enum
import io
import os
import pickle
import random
import struct
import time
import types
import zipfile

import pytest
import torch

from ngpt.checkpoint import open_checkpoint
from ngpt.checkpoint.pickle_scan import MAX_INSTRUCTIONS, scan_pickle
from ngpt.errors import CheckpointError, ConfigError, CorruptFileError, NGPTDeployError, ShapeError, UnsafeFormatError
from tests.conftest import GOLDEN
from tests.ngpt.making import private_bytes, research, save, write_archive

TRAINED = GOLDEN / "research-train-py" / "ckpt.pt"
WTE = "transformer.wte.weight"


@pytest.fixture
def stored():
    return research()


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Colour(enum.Enum):
    RED = 1


def boom():
    raise AssertionError("it ran")


REFUSED = {
    "os": (Calls(os.mkdir, "owned"), "posix.mkdir"),
    "eval": (Calls(eval, "1"), "builtins.eval"),
    "a test's function": (Calls(boom), "boom"),
    "an enum": (Colour.RED, "Colour"),
    "torch's own loader": (Calls(torch.load, "x"), "torch.serialization.load"),
    "memory": (Calls(bytearray, 1 << 50), "builtins.bytearray"),
    "a storage of its own": (Calls(torch.FloatStorage, 1 << 50), "torch.FloatStorage"),
    "sparse": (torch.eye(4).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    "sparse rows": (lambda: torch.eye(4).to_sparse_csr(), "torch._utils._rebuild_sparse_tensor"),
    "meta": (torch.empty(1 << 40, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "torch._utils._rebuild_qtensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["config", "model"])
@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_are_refused_are_named_and_do_not_run(case, where, stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, name = REFUSED[case]
    value = value() if isinstance(value, types.FunctionType) else value  # torch warns of these two when they are made
    if where == "config":
        stored["config"] = [value]
    else:
        stored["model"][WTE] = value
    with pytest.raises(UnsafeFormatError, match=name) as caught:
        open_checkpoint(save(stored, tmp_path))
    text = str(caught.value)
    assert "\n" not in text and "\x1b" not in text and "torch.serialization.add_safe_globals" not in text and len(text) < 600
    assert not (tmp_path / "owned").exists()


def lists_in_lists(value=0):
    for _ in range(60):
        value = [value, value]
    return value


def tuples_in_tuples():
    value = ()
    for _ in range(60):
        value = (value, value)
    return value


def hashed_tuples():
    """{tuples_in_tuples(): 1}, which cannot be made here: hashing it would never end."""
    return pickle.dumps({"model": {}, "k": {0: 1}}, 2).replace(b"K\x00K\x01s", b")" + b"q\x63h\x63\x86" * 60 + b"K\x01s")


BOMBS = {
    "model": lambda s: s.update(model=lists_in_lists()),
    "a tensor": lambda s: s["model"].update({WTE: lists_in_lists()}),
    "model_args": lambda s: s.update(model_args=lists_in_lists()),
    "an argument": lambda s: s["model_args"].update(n_layer=lists_in_lists()),
    "a flag": lambda s: s["model_args"].update(use_nGPT=lists_in_lists()),
    "base_scale": lambda s: s["model_args"].update(base_scale=tuples_in_tuples()),
    "an unknown argument": lambda s: s["model_args"].update({"x" * 100_000: 1}),
    "layers": lambda s: s["model_args"].update(n_layer=2**31),
    "huge numbers": lambda s: s["model_args"].update(n_embd=2**2000, n_head=1),
    "vocabulary": lambda s: s["model_args"].update(vocab_size=2**40),
    "context": lambda s: s["model_args"].update(block_size=2**40),
    "a huge scale": lambda s: s["model_args"].update(base_scale=2**2000),
    "an infinite scale": lambda s: s["model_args"].update(base_scale=float("inf")),
    "a scale of 5e-324": lambda s: s["model_args"].update(base_scale=5e-324),
    "a tensor for a number": lambda s: s["model_args"].update(n_layer=torch.ones(3)),
    "a tensor for a flag": lambda s: s["model_args"].update(use_nGPT=torch.ones(3)),
    "keys of every kind": lambda s: s["model"].update({None: 1, 3: 4, 2.5: torch.ones(1)}),
    "a long name": lambda s: s["model"].update({"x" * 1_000_000: torch.ones(1)}),
    "lone surrogates": lambda s: s["model"].update({"\ud800": torch.ones(1)}),
    "escape codes": lambda s: s["model"].update({"\x1b[2J\n": torch.ones(1)}),
    "an expanded tensor": lambda s: s["model"].update({WTE: torch.ones(1).expand(256, 64)}),
    "overlapping rows": lambda s: s["model"].update({WTE: torch.ones(400).as_strided((256, 64), (1, 1))}),
    "complex": lambda s: s["model"].update({WTE: torch.ones(256, 64, dtype=torch.complex64)}),
    "float8": lambda s: s["model"].update({WTE: torch.ones(256, 64).to(torch.float8_e4m3fn)}),
    "negated view": lambda s: s["model"].update({WTE: torch._neg_view(torch.ones(256, 64))}),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_hostile_file_ends_in_a_short_error_soon(case, stored, tmp_path):
    BOMBS[case](stored)
    path = save(stored, tmp_path)
    start, before = time.perf_counter(), private_bytes()
    with pytest.raises(NGPTDeployError) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - start < 1 and private_bytes() - before < 64 << 20
    text = str(caught.value)
    assert len(text) < 1500 and text.isprintable(), text


def archive(tmp_path, pickled, **members):
    return write_archive(tmp_path / "ckpt.pt", {"x/data.pkl": pickled, "x/byteorder": b"little", "x/version": b"3\n"} | members)


PICKLES = {
    "hashing tuples": hashed_tuples(),
    "many instructions": b"\x80\x02" + b"]0" * MAX_INSTRUCTIONS + b"N.",
    "no end": b"\x80\x02]",
    "empty": b"",
    "another protocol": pickle.dumps({"model": {}}, 4),
    "text protocol": pickle.dumps({"model": {}}, 0),
    "an unknown memo": b"\x80\x02h\x07.",
    "a mark kept": b"\x80\x02(q\x00h\x00t.",
    "an empty stack": b"\x80\x02R.",
    "a list as a key": b"\x80\x02}]K\x01s.",
    "numbers made to collide": b"\x80\x02}\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01K\x01s.",
    "a long number in text": b"I" + b"9" * 100_000 + b"\n.",
    "not a dict": pickle.dumps([1], 2),
    "a number": b"\x80\x02K\x01.",
    "a name with spaces": b"\x80\x02ca b\nc d\n.",
    "a name without end": b"\x80\x02ca",
    "a huge claim": b"\x80\x02X\xff\xff\xff\x7fabc.",
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_hostile_pickle_ends_in_a_short_error_soon(case, tmp_path):
    path = archive(tmp_path, PICKLES[case])
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def tensor_pickle(size, stride, offset=0, items=8):
    """{"model": a tensor of that claim}, written by hand."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            hooks = collections.OrderedDict()
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, hooks)

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", items) if isinstance(value, Storage) else None

    out = io.BytesIO()
    Writer(out, 2).dump({"model": {"x": Tensor()}, "model_args": {}})
    return out.getvalue()


def test_a_tensor_written_by_hand_is_read(tmp_path):
    path = archive(tmp_path, tensor_pickle((2, 4), (4, 1)), **{"x/data/0": bytes(32)})
    with pytest.raises(ConfigError, match="model_args lacks"):
        open_checkpoint(path)


CLAIMS = {
    "more rows": ((3, 4), (4, 1)),
    "a wide stride": ((2, 4), (1 << 40, 1)),
    "an offset": ((2, 4), (4, 1), 1),
    "a negative stride": ((2, 4), (-4, 1), 4),
    "a negative size": ((-2, 4), (4, 1)),
    "a negative offset": ((2, 4), (4, 1), -1),
    "axes without strides": ((2, 4), (4,)),
    "many axes": ((1,) * 1000, (1,) * 1000),
    "a larger storage": ((2, 4), (4, 1), 0, 9),
    "an endless storage": ((2, 4), (4, 1), 0, 1 << 60),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(case, tmp_path):
    path = archive(tmp_path, tensor_pickle(*CLAIMS[case]), **{"x/data/0": bytes(32)})
    with pytest.raises(CheckpointError, match="more bytes than there are|_rebuild_tensor_v2"):
        open_checkpoint(path)


def test_a_storage_that_is_no_member_is_refused(tmp_path):
    with pytest.raises(CorruptFileError, match="no such member"):
        open_checkpoint(archive(tmp_path, tensor_pickle((2, 4), (4, 1))))


def test_archives_that_two_parsers_could_read_differently_are_refused(tmp_path):
    whole, ckpt = TRAINED.read_bytes(), tmp_path / "ckpt.pt"
    ckpt.write_bytes(b"PK" + whole)
    with pytest.raises(CorruptFileError, match="zip64"):
        open_checkpoint(ckpt)
    ckpt.write_bytes(b"PK" + archive(tmp_path, pickle.dumps({}, 2)).read_bytes())
    with pytest.raises(CorruptFileError, match="list of members"):
        open_checkpoint(ckpt)
    ckpt.write_bytes(whole[:-2] + b"\x03\x00abc")  # a comment, in which another end could hide
    with pytest.raises(CorruptFileError):
        open_checkpoint(ckpt)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(ckpt, "w") as file:
        for _ in range(2):
            file.writestr("x/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(UnsafeFormatError, match="twice"):
        open_checkpoint(ckpt)
    write_archive(ckpt, {"x/data.pkl": pickle.dumps({}, 2), "y/data.pkl": pickle.dumps({}, 2)})
    with pytest.raises(CheckpointError, match="twice|one folder"):
        open_checkpoint(ckpt)


def test_a_torchscript_program_is_called_one(tmp_path):
    path = write_archive(tmp_path / "ckpt.pt", {"x/data.pkl": pickle.dumps({}, 2), "x/constants.pkl": pickle.dumps((), 2)})
    with pytest.raises(UnsafeFormatError, match="TorchScript"):
        open_checkpoint(path)


def test_what_torch_itself_refuses_comes_without_its_advice(stored, tmp_path, monkeypatch):
    stored["config"] = argparse.Namespace(a=1)
    monkeypatch.setattr("ngpt.checkpoint.torch_file._stand_ins", lambda _: [])
    with pytest.raises(CorruptFileError, match="argparse.Namespace") as caught:
        open_checkpoint(save(stored, tmp_path))
    assert "safe_globals" not in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_an_archive_that_could_expand_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", bytes(1 << 20))
    with pytest.raises(UnsafeFormatError, match="compressed"):
        open_checkpoint(tmp_path)


def test_a_member_whose_size_is_a_lie_is_refused(tmp_path):
    path = archive(tmp_path, tensor_pickle((2, 1 << 20), (1 << 20, 1), 0, 1 << 21), **{"x/data/0": bytes(32)})
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    while data[entry + 46 : entry + 54] != b"x/data/0":
        entry = data.index(b"PK\x01\x02", entry + 1)
    data[entry + 20 : entry + 28] = struct.pack("<II", 1 << 23, 1 << 23)
    path.write_bytes(data)
    with pytest.raises(NGPTDeployError):
        open_checkpoint(path)


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_pickle_is_an_error_of_ours_or_harmless(seed, tmp_path):
    """Bytes changed, cut and moved at random; thousands more were tried by hand."""
    with zipfile.ZipFile(TRAINED) as file:
        members = {member.filename: file.read(member) for member in file.infolist()}
    name = next(member for member in members if member.endswith("data.pkl"))
    draw, outcomes = random.Random(seed), collections.Counter()
    for _ in range(60):
        data = bytearray(members[name])
        for _ in range(draw.choice([1, 1, 2, 6])):
            at, kind = draw.randrange(len(data)), draw.random()
            if kind < 0.5:
                data[at] = draw.choice([draw.randrange(256), *b"()]}.RQtqhbsue\x85\x86\x87"])
            elif kind < 0.7:
                del data[at : at + draw.randrange(1, 20)]
            elif kind < 0.9:
                other = draw.randrange(len(data))
                data[at:at] = data[other : other + draw.randrange(1, 40)]
            else:
                data = data[: max(at, 20)]
        try:
            with open_checkpoint(write_archive(tmp_path / "ckpt.pt", members | {name: bytes(data)})) as checkpoint:
                checkpoint.validate()
            outcomes["read"] += 1
        except NGPTDeployError as error:
            assert len(str(error)) < 1500 and str(error).isprintable()
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20


def test_the_scan_and_torch_agree_on_what_the_golden_files_hold():
    for folder in ("research-train-py", "research-checkpoint"):
        with zipfile.ZipFile(GOLDEN / folder / "ckpt.pt") as file:
            sizes = {member.filename.partition("/")[2]: member.file_size for member in file.infolist()}
            root = file.namelist()[0].partition("/")[0]
            found = scan_pickle(file.read(f"{root}/data.pkl"), sizes, folder)
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(GOLDEN / folder / "ckpt.pt")
        assert found.plain == set(unsafe)


def test_repeated_values_are_named(stored, tmp_path):
    stored["model"][WTE] = torch.ones(1).expand(256, 64)
    with pytest.raises(ShapeError, match="repeats what it stores"):
        open_checkpoint(save(stored, tmp_path))
