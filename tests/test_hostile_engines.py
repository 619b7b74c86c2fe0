"""Engine folders that somebody altered: every command and function that opens one refuses them in words, in one line, unharmed."""

import copy
import json
import shutil

import pytest

from engines import load_engine
from engines.runtime.errors import ServingError
from scripts.cli import main

ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e\nparity   pass"


@pytest.fixture
def engine(tiny_engine_folder, tmp_path):
    """A copy that may be altered; what is large in it is a link inside the folder's file system."""
    return shutil.copytree(tiny_engine_folder, tmp_path / "engine")


def alter(engine, path, value):
    manifest = json.loads((engine / "manifest.json").read_text())
    table = manifest
    *parents, last = path.split("/")
    for key in parents:
        table = table[key]
    if value is KeyError:
        del table[last]
    else:
        table[last] = copy.deepcopy(value)
    (engine / "manifest.json").write_text(json.dumps(manifest))


def run(capsys, *args):
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert all(letter.isprintable() or letter == "\n" for letter in out + err)
    assert err.count("\n") == (code != 0) and len(err) < 2500 and "Traceback" not in err and "--debug" not in err
    return code, out, err


COMMANDS = {
    "inspect": (),
    "inspect quickly": ("--quick",),
    "inspect as JSON": ("--json",),
    "package": ("--output", "{}/models", "--allow-unverified"),
    "verify": ("--checkpoint", "examples/ngpt-tiny", "--report", "{}/report"),
    "generate": (),
}


def refused_by_all(engine, capsys, named):
    for name, options in COMMANDS.items():
        command = name.split()[0]
        arguments = [option.format(engine.parent) for option in options]
        where = ["x", "--engine", engine] if command == "generate" else [engine]
        code, out, err = run(capsys, command, *where, *arguments)
        assert code == 2 and named in err and out == "", name
    with pytest.raises(ServingError, match=named.replace("[", r"\[")):
        load_engine(engine)
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]


# Each is one of its kind; the kinds were looked for with three thousand alterations of every field.
ALTERATIONS = [
    ("parity", {"verdict": ["pass"]}, "parity.verdict"),
    ("graph", ["model.onnx"], "graph"),
    ("target/providers", [], "target.providers"),
    ("target/runtime", ESCAPE * 1000, "target.runtime"),
    ("model/num_layers", 10**400, "model.num_layers"),
    ("model/head_dim", None, "model.head_dim"),
    ("flags", "none", "flags"),
    ("files", {ESCAPE: {"bytes": 1, "sha256": "a" * 64}}, "files"),
    ("digests", {ESCAPE: 1}, "digests"),
    ("tools", KeyError, "tools"),
]


@pytest.mark.parametrize(("path", "value", "named"), ALTERATIONS, ids=[path for path, _, _ in ALTERATIONS])
def test_an_odd_manifest_is_refused_everywhere(engine, capsys, path, value, named):
    alter(engine, path, value)
    refused_by_all(engine, capsys, named)


@pytest.mark.parametrize("what", ["missing", "shorter"])
def test_a_folder_whose_files_are_not_those_that_were_verified_is_refused_everywhere(engine, capsys, what):
    graph = engine / "model.onnx"
    data = graph.read_bytes()
    graph.unlink() if what == "missing" else graph.write_bytes(data[:-1])
    refused_by_all(engine, capsys, "model.onnx")


def test_altered_contents_are_found_unless_asked_not_to_look(engine, capsys):
    graph = engine / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    code, out, err = run(capsys, "inspect", engine)
    assert code == 2 and out == "" and "SHA-256" in err
    code, out, _ = run(capsys, "inspect", engine, "--quick")
    assert code == 0 and "contents not checked" in out


def test_what_a_manifest_says_cannot_steer_the_terminal(engine, capsys):
    for path in (
        "name",
        "created",
        "target/name",
        "target/note",
        "target/precision",
        "tools/numpy",
        "digests/spec",
        "parity/html",
        "precision/head",
    ):
        alter(engine, path, ESCAPE * 50)
    alter(engine, "flags/compute_capability", [ESCAPE])
    alter(engine, "tools/" + ESCAPE, "1")
    code, out, err = run(capsys, "inspect", engine)
    assert code == 2 and "verdict does not hold" in err and len(out.splitlines()) == 10 and len(out) < 4000
    assert [line for line in out.splitlines() if line.startswith("parity")] == [out.splitlines()[-1]]
    code, out, _ = run(capsys, "inspect", engine, "--json")
    assert code == 2 and json.loads(out)["name"] == ESCAPE * 50


@pytest.mark.parametrize(
    ("path", "value"),
    [("model/num_layers", 5), ("model/num_layers", 9999), ("model/num_kv_heads", 1), ("model/head_dim", 64), ("target/cache", "paged"),
     ("model/cache_dtype", "float64"), ("model/max_length", 2**31 - 1), ("model/vocab_size", 2**31 - 1)],
)  # fmt: skip
def test_a_manifest_that_contradicts_the_graph_ends_in_words(engine, capsys, path, value):
    """Some are refused when the engine is loaded, some by the runtime's first step."""
    alter(engine, path, value)
    code, out, _ = run(capsys, "generate", "def", "--engine", engine, "--max-tokens", 2)
    assert code == 2 or path == "model/max_length"
    assert not out.strip() or path == "model/max_length"


def test_a_tokenizer_brought_in_by_a_link_is_refused(engine, capsys, tmp_path):
    manifest = json.loads((engine / "manifest.json").read_text())
    (engine / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (engine / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    del manifest["files"]["tokenizer.json"]
    (engine / "manifest.json").write_text(json.dumps(manifest))
    for command in (("generate", "x", "--engine", engine), ("package", engine, "--output", tmp_path / "models")):
        code, _, err = run(capsys, *command)
        assert code == 2 and "a file inside" in err
    assert not (tmp_path / "models").exists()
