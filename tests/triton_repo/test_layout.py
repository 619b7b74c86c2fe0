"""What one server can hold: engines by name, versions, instances, GPUs. Served for real but for the GPUs, which this server build has none of."""

from __future__ import annotations

import shutil
import urllib.request

import pytest

from ngpt.errors import PackagingError
from scripts.cli import main
from tests.triton_repo.conftest import PROMPT
from tests.triton_repo.test_package import config_of
from triton_repo.client import generate_text, generate_tokens
from triton_repo.package import package_engine
from triton_repo.server import TritonServer


def test_two_engines_and_two_versions_in_one_server(tiny_engine_folder, served, tmp_path):
    options = {"allow_unverified": True, "num_slots": 2, "threads": 1}
    models = package_engine(tiny_engine_folder, tmp_path / "models", **options, instances=2)
    second = package_engine(tiny_engine_folder, tmp_path / "second", **options, model_version=2)
    other = package_engine(tiny_engine_folder, tmp_path / "other", **options, name="small-1.5")
    for model in other.iterdir():
        shutil.copytree(model, models / model.name)
    shutil.copytree(second / "ensemble" / "2", models / "ensemble" / "2")
    with (models / "ensemble" / "config.pbtxt").open("a") as config:
        config.write("version_policy { all {} }\n")
    expected = generate_text(served.url, PROMPT, max_tokens=12)
    ids = served.engine.tokenizer.encode(PROMPT)
    with TritonServer(models, log_path=tmp_path / "log.txt", start_timeout=120) as server:
        for _ in range(4):
            for model in ("ensemble", "small-1.5"):
                assert generate_text(server.grpc_url, PROMPT, max_tokens=12, model=model) == expected
        found = {
            model: generate_tokens(server.grpc_url, ids, max_tokens=12, model=model)
            for model in ("tensorrt_llm", "small-1.5_tensorrt_llm", "ensemble")
        }
        assert set(map(tuple, found.values())) == {tuple(served.engine.generate([ids], 12)[0])}
        slots = [line for line in _metrics(server) if line.startswith("ngpt_slots{")]
    # Two instances of each of two versions, and the other engine: nobody's numbers are written over.
    assert len(slots) == 5 and all(line.endswith(" 2") for line in slots) and sum('version="2"' in line for line in slots) == 2


def _metrics(server):
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        return response.read().decode().splitlines()


def test_instances_on_gpus_are_written_as_triton_reads_them(tiny_engine_folder, tmp_path):
    package_engine(tiny_engine_folder, tmp_path / "models", allow_unverified=True, instances=2, gpus=[0, 3])
    (group,) = config_of(tmp_path / "models", "ensemble").instance_group
    assert group.kind == group.KIND_GPU and list(group.gpus) == [0, 3] and group.count == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "a/b"}, "name"), ({"name": "../x"}, "name"), ({"name": ""}, "name"), ({"name": ".x"}, "name"), ({"name": "x" * 200}, "name"),
        ({"instances": 0}, "instances"), ({"model_version": 0}, "model_version"), ({"gpus": [1, 1]}, "gpus"), ({"gpus": [-1]}, "gpus"),
    ],
)  # fmt: skip
def test_what_no_server_could_load_is_refused(tiny_engine_folder, tmp_path, options, named):
    with pytest.raises(PackagingError, match=f"^{named}: expected"):
        package_engine(tiny_engine_folder, tmp_path / "models", allow_unverified=True, **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_passes_them_on(tiny_engine_folder, tmp_path):
    words = ["--name", "m", "--model-version", "3", "--instances", "2", "--exclude-input-in-output", "--no-special-tokens"]
    assert main(["package", str(tiny_engine_folder), "--output", str(tmp_path / "models"), "--allow-unverified", *words]) == 0
    assert {path.name for path in (tmp_path / "models").iterdir()} == {
        "m",
        "m_tensorrt_llm",
        "m_preprocessing",
        "m_postprocessing",
    }
    config = config_of(tmp_path / "models", "m")
    assert config.name == "m" and (tmp_path / "models" / "m" / "3" / "engine" / "manifest.json").is_file()
    found = {name: value.string_value for name, value in config.parameters.items()}
    assert (found["exclude_input_in_output"], found["add_special_tokens"]) == ("true", "false")
    assert config.instance_group[0].count == 2
    with pytest.raises(SystemExit, match="2"):
        main(["package", str(tiny_engine_folder), "--output", str(tmp_path / "x"), "--gpus", "0,a"])
