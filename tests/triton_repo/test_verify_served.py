"""`verify --url` on a real Triton server with two models: the example's engine, and one that was built of other weights."""

import json
import shutil

import pytest
import safetensors.numpy

from engines.build import build_engine
from engines.parity.wire import CONTEXT, GENERATION, PROBABILITIES, verify_served
from engines.record import recorded_precision
from engines.runtime.manifest import read_manifest
from ngpt.checkpoint import open_checkpoint
from ngpt.errors import ServerError
from scripts.cli import main
from tests.conftest import TINY
from triton_repo.package import package_engine
from triton_repo.served import ServedModel
from triton_repo.server import TritonServer


@pytest.fixture(scope="module")
def two(tiny_engine_folder, tmp_path_factory):
    """The url of a server, and the engine folder of its model wrong_tensorrt_llm."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(TINY, folder / "checkpoint")
    weights = folder / "checkpoint" / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"] *= -1
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
    wrong = build_engine(folder / "checkpoint", "cpu-int8", folder / "wrong", verify=False)
    package_engine(tiny_engine_folder, folder / "models", num_slots=4, threads=1)
    package_engine(wrong, folder / "second", num_slots=4, threads=1, name="wrong", allow_unverified=True)
    for model in (folder / "second").glob("wrong*"):
        shutil.move(model, folder / "models" / model.name)
    with TritonServer(folder / "models", log_path=folder / "log.txt", start_timeout=90) as server:
        yield server.grpc_url, wrong


def verify(url, *more):
    return main(["verify", "--url", url, "--checkpoint", str(TINY), "--decode-steps", "8", "--json", *map(str, more)])


def test_a_right_server_passes_and_a_wrong_one_does_not(two, tiny_engine_folder, tmp_path, capsys):
    url, wrong = two
    assert verify(url, "--engine", tiny_engine_folder, "--report", tmp_path / "right") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "pass" and found["decided_by"] == {"prefill": CONTEXT, "decode": GENERATION}
    about = {"url": url, "model": "tensorrt_llm", "version": "1", "platform": "ensemble"}
    assert about.items() <= found["server"].items() and found["server"]["server"].startswith("triton ")
    assert (tmp_path / "right" / "parity.html").is_file()
    assert verify(url, "--model-name", "wrong_tensorrt_llm", "--target", "cpu-int8", "--report", tmp_path / "wrong") == 3
    assert "prefill: logit error, mean" in json.loads(capsys.readouterr().out)["failed_checks"]
    assert verify(url, "--model-name", "wrong_tensorrt_llm", "--engine", wrong) == 2
    assert "not built from this checkpoint" in capsys.readouterr().err


class Sparing(ServedModel):
    """As a server whose engine was built to give no logits."""

    offered = frozenset({PROBABILITIES})


def test_a_server_that_gives_no_logits_is_decided_by_its_log_probabilities(two, tiny_engine_folder):
    url, _ = two
    precision = recorded_precision(read_manifest(tiny_engine_folder))
    prompts = ["def main():", [5, 900, 33, 2000, 17]]
    with open_checkpoint(TINY) as checkpoint:
        report = verify_served(Sparing(url), checkpoint, precision=precision, prompts=prompts, decode_steps=4)
    assert report.verdict == "pass", report.failures
    assert report.summary["decided_by"]["decode"] == PROBABILITIES and len(report.summary["not_applicable"]) >= 2


def test_a_model_that_is_not_there_and_options_that_do_not_fit_are_named(two, tiny_engine_folder, capsys):
    url, _ = two
    with pytest.raises(ServerError, match="does not describe the model nobody"):
        ServedModel(url, "nobody").identity  # noqa: B018
    assert verify("127.0.0.1:1", "--target", "cpu-int8") == 2
    assert "no Triton server answers" in capsys.readouterr().err
    for more, named in (
        ([], "one of --engine FOLDER and --target NAME"),
        (["--target", "cpu-int8", "--sign", "key"], "--sign is for an engine folder"),
        (["--target", "cpu-int8", "--engine", tiny_engine_folder], "found both"),
    ):
        assert verify(url, *more) == 2
        assert named in capsys.readouterr().err
    assert main(["verify", "--checkpoint", str(TINY)]) == 2
    assert "an engine folder, or --url" in capsys.readouterr().err
    assert main(["verify", str(tiny_engine_folder), "--checkpoint", str(TINY), "--target", "cpu-int8"]) == 2
    assert "--target is about a server" in capsys.readouterr().err
