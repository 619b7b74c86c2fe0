"""What was copied into a model repository is what is served: a copy that changed is refused by name as its model starts."""

import ast
import json
import logging
import shutil

import pytest
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import model_config_pb2

from ngpt.errors import ServerError
from tests.conftest import ROOT
from triton_repo import TritonServer, package_engine
from triton_repo.config_pbtxt import parameters_of
from triton_repo.copies import DIGESTS, ChangedCopyError, check_copies


@pytest.fixture(scope="module")
def packaged(tiny_engine_folder, tmp_path_factory):
    return package_engine(tiny_engine_folder, tmp_path_factory.mktemp("packaged") / "models")


@pytest.fixture
def models(packaged, tmp_path):
    return shutil.copytree(packaged, tmp_path / "models")


def config_of(models, name):
    text = (models / name / "config.pbtxt").read_text()
    return MessageToDict(text_format.Parse(text, model_config_pb2.ModelConfig()), preserving_proto_field_name=True)


def swap_ids(path):
    """500 tokens get the ids of others: a valid tokenizer, of another model."""
    data = json.loads(path.read_text())
    tokens = list(data["model"]["vocab"])[300:800]
    ids = [data["model"]["vocab"][token] for token in tokens]
    data["model"]["vocab"].update(zip(tokens, reversed(ids), strict=True))
    path.write_text(json.dumps(data))


def test_a_fresh_repository_is_what_was_packaged(models, caplog):
    for name in ("ensemble", "preprocessing", "postprocessing"):
        check_copies(models / name / "1", config_of(models, name))
        text = (models / name / "config.pbtxt").read_text()
        parsed = {key: value.get("string_value", "") for key, value in config_of(models, name)["parameters"].items()}
        assert parameters_of(text) == parsed and parsed
    assert not caplog.records


CHANGES = {
    "swapped ids": ("ensemble", "tokenizer/tokenizer.json", swap_ids),
    "in another copy": ("preprocessing", "tokenizer/tokenizer.json", swap_ids),
    "the runtime's code": ("ensemble", "engines/runtime/sampler.py", lambda path: path.write_text(path.read_text() + "\n")),
    "the model itself": ("postprocessing", "model.py", lambda path: path.write_text(path.read_text() + "\n")),
    "a setting of the tokenizer": ("ensemble", "tokenizer/tokenizer_config.json", lambda path: path.write_text("{}")),
    "gone": ("ensemble", "tokenizer/tokenizer_config.json", lambda path: path.unlink()),
    "code that is new": ("ensemble", "numpy.py", lambda path: path.write_text("")),
    "the digests are gone": ("ensemble", DIGESTS, lambda path: path.unlink()),
    "the digests are nonsense": ("ensemble", DIGESTS, lambda path: path.write_text("[" * 100_000)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_copy_is_named(models, what):
    model, name, change = CHANGES[what]
    change(models / model / "1" / name)
    with pytest.raises(ChangedCopyError, match=f"{model}/1/{name.replace('.', chr(92) + '.')} is not what was packaged"):
        check_copies(models / model / "1", config_of(models, model))


def test_what_a_server_leaves_there_is_no_change(models):
    version = models / "ensemble" / "1"
    (version / "__pycache__").mkdir()
    (version / "__pycache__" / "model.cpython-310.pyc").write_bytes(b"x")
    (version / "notes.txt").write_text("mine")
    check_copies(version, config_of(models, "ensemble"))


def test_a_parameter_is_the_operators_to_change_and_the_log_says_so(models, caplog):
    config = config_of(models, "ensemble")
    config["parameters"]["num_slots"]["string_value"] = "3"
    with caplog.at_level(logging.WARNING, logger="ngpt"):
        check_copies(models / "ensemble" / "1", config)
    assert "ensemble: the parameter num_slots was '8' when it was packaged and is '3' now" in caplog.text


def test_the_server_does_not_serve_a_changed_copy(models, tmp_path):
    swap_ids(models / "ensemble" / "1" / "tokenizer" / "tokenizer.json")
    with pytest.raises(ServerError) as caught, TritonServer(models, log_path=tmp_path / "log"):
        pass
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert (
        "tokenizer/tokenizer.json is not what was packaged" in said
        or "is not what was packaged" in (tmp_path / "log").read_text()
    )


@pytest.mark.parametrize(
    "name", ["engine/model", "shared/preprocessing", "shared/postprocessing", "trtllm_backend/text", "trtllm_pytorch/model"]
)
def test_every_model_compares_its_copies_before_it_reads_one(name):
    tree = ast.parse((ROOT / "triton_repo" / "templates" / f"{name}.py").read_text())
    start = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "initialize")
    called = [node.func.id for node in ast.walk(start) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    lines = {
        node.func.id: node.lineno for node in ast.walk(start) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "check_copies" in called
    assert all(lines["check_copies"] < line for other, line in lines.items() if other in ("load_engine", "_import", "Tokenizer"))
