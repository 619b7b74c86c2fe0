"""What every command has in common: it is light, it ends in one line, and it cleans up."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.build import engine_name
from scripts.cli import main
from scripts.terminal import harmless, plain
from tests.conftest import GOLDEN, ROOT, TINY

# Runs a command where the libraries named first are not installed, and tells which of them it asked for.
WITHOUT = """
import importlib.abc, json, sys

absent, asked = sys.argv[1].split(","), []

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from scripts.cli import main

try:
    code = main(sys.argv[2:])
except SystemExit as ended:
    code = ended.code
print(json.dumps({"code": code, "asked": asked, "loaded": sorted(set(absent) & set(sys.modules))}), file=sys.stderr)
"""
HEAVY = "torch,transformers,onnx,onnx_ir,onnxruntime"


def without(absent, *args, **options):
    """Exit code, standard output, standard error, and what was asked for of the libraries that are not there."""
    command = [sys.executable, "-c", WITHOUT, absent, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)
    *err, last = done.stderr.splitlines()
    told = json.loads(last)
    assert told["loaded"] == []
    return told["code"], done.stdout, "\n".join(err), told["asked"]


def command(*args, env=None, **options):
    words = [sys.executable, "-m", "scripts.cli", *map(str, args)]
    # With buffers, as users have them: what is left in one is written when Python ends.
    env = {name: value for name, value in (env or os.environ).items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env, **options)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["build", "--help"], 0),
        (["plan", "--target", "h100", "--json"], 0),
        (["plan", "--checkpoint", str(TINY)], 0),
        (["generate", "x", "--url", "127.0.0.1:1"], 2),
        (["serve", "nowhere"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_light_commands_load_nothing_heavy(args, code):
    found, _, err, asked = without(HEAVY, *args)
    assert (found, asked) == (code, []) and len(err.splitlines()) == (code == 2)


def test_what_inspects_and_packages_loads_nothing_heavy(tiny_engine_folder, tmp_path):
    for args in (("inspect", tiny_engine_folder), ("package", tiny_engine_folder, "--output", tmp_path / "models")):
        code, out, _, asked = without(HEAVY, *args)
        assert (code, asked) == (0, []) and str(tmp_path if args[0] == "package" else "pass") in out


def test_an_engine_answers_where_torch_is_not_installed(tiny_engine_folder):
    code, out, _, asked = without("torch,transformers", "generate", "def ", "--engine", tiny_engine_folder, "--max-tokens", "3")
    assert (code, asked) == (0, []) and out.strip()


@pytest.mark.parametrize(
    "args",
    [
        ["build", "--checkpoint", str(TINY), "--output", "build/not-made"],
        ["convert", "--checkpoint", str(TINY), "--output", "build/not-made"],
        ["bench", "--checkpoint", str(TINY)],
    ],
    ids=lambda args: args[0],
)
def test_what_needs_torch_says_which_packages_to_install_where_it_is_absent(args):
    code, _, err, asked = without("torch,transformers", *args)
    assert code == 2 and asked and len(err.splitlines()) == 1 and re.search(r"torch.*pip install .*'torch>=", err), err
    assert not (ROOT / "build" / "not-made").exists()


# Errors


@pytest.mark.parametrize(
    ("absent", "args"),
    [
        ("numpy", ["inspect", "nowhere"]),
        ("numpy", ["plan"]),
        ("tokenizers", ["inspect", "nowhere"]),
        ("tqdm", ["build", "--checkpoint", "nowhere", "--output", "nowhere"]),
        ("grpc", ["generate", "x"]),
        ("google", ["generate", "x"]),
        ("pytriton", ["serve", "."]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_missing_library_of_any_kind_is_one_line_that_says_how_to_install_it(absent, args):
    code, out, err, asked = without(absent, *args)
    assert code == 2 and asked and out == "" and err.count("\n") == 0
    assert "pip install" in err and "--debug" not in err


def test_an_errors_text_is_one_bounded_line_that_only_shows():
    assert plain("a\x1b[31m\n\u202eb\x00\udcffé日🙂") == r"a\x1b[31m\n\u202eb\x00\udcffé日🙂"
    assert len(plain("x" * 10**6)) < 2100 and plain("ab" * 5000, 100).endswith("ab")
    assert harmless("a\tb\n\x1b[31m\x9b\x7fé") == "a\tb\n[31mé"


FAULTS = {
    "disk full": (OSError(28, "No space left on device"), 2, "Free some room"),
    "no such file": (FileNotFoundError(2, "No such file or directory", "/a/b"), 2, "/a/b"),
    "no memory": (MemoryError(), 2, "not enough memory"),
    "no library": (ModuleNotFoundError("No module named 'tritonclient'", name="tritonclient"), 2, "pip install "),
    "a fault of ours": (
        ZeroDivisionError("division\nby\x1b zero"),
        2,
        r"ZeroDivisionError: division\nby\x1b zero. Run it again with --debug",
    ),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped by SIGINT"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_goes_wrong_ends_as_one_line_and_an_exit_code(fault, capsys, monkeypatch):
    error, code, told = FAULTS[fault]

    def fail(*args):
        raise error

    monkeypatch.setattr("engines.capacity.read_spec", fail)
    assert main(["plan"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ngpt-deploy plan: ") and err.count("\n") == 1 and told in err
    if code == 2:
        with pytest.raises(type(error)):
            main(["plan", "--debug"])


def test_a_real_libraries_error_on_damaged_weights_is_words_too(tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    def fail(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("ngpt.checkpoint.save.save_file", fail)
    assert main(["convert", "--checkpoint", str(GOLDEN / "gqa"), "--output", str(tmp_path / "out")]) == 2
    assert "No space left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["plan"], ["--help"], ["build", "--help"]])
def test_a_closed_pipe_and_a_full_disk_behind_it_end_in_one_line(args):
    read, write = os.pipe()
    os.close(read)
    process = command(*args, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "nobody reads the output" in err
    with open("/dev/full", "w") as full:  # noqa: PTH123
        process = command(*args, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "No space left" in err


def test_generating_ends_when_nobody_reads_any_more(tiny_engine_folder):
    process = command("generate", "def ", "--engine", tiny_engine_folder, "--max-tokens", "400", stdout=subprocess.PIPE)
    assert process.stdout.read(1)
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "nobody reads" in err


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_closed_from_the_start_is_no_trouble(stream):
    number = {"stdout": 1, "stderr": 2}[stream]
    done = subprocess.run(
        f'"{sys.executable}" -m scripts.cli plan --target {"h100" if stream == "stdout" else "nonsense"} {number}>&-',
        shell=True, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == (0 if stream == "stdout" else 2)
    assert done.stdout == done.stderr == ""  # an error that standard error cannot take does not go to standard output


def test_no_file_gets_the_number_of_a_stream_that_was_closed(tmp_path):
    code = f"from scripts.terminal import prepared\nwith prepared():\n    print(open({str(tmp_path / 'file')!r}, 'w').fileno())"
    words = ["sh", "-c", f'"{sys.executable}" -c "$1" 2>&-', "sh", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout) > 2


def test_a_terminal_that_knows_little_gets_all_it_can_show(tmp_path):
    config = json.loads((GOLDEN / "gqa" / "config.json").read_text())
    (tmp_path / "ä.json").write_text(json.dumps(config | {"model_type": "日"}))
    process = command(
        "plan", "--checkpoint", tmp_path / "ä.json", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and r"\u65e5" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["build", "convert", "package"])
def test_a_limit_of_file_sizes_is_named_and_nothing_stays(name, tiny_engine_folder, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, 100 << 10))

    where = [str(tiny_engine_folder)] if name == "package" else ["--checkpoint", str(TINY)]
    process = command(name, *where, "--output", tmp_path / "out", stdout=subprocess.DEVNULL, preexec_fn=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.count("\n") == 1 and "File too large" in err and "ulimit -f" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["build", "convert", "package", "verify"])
def test_a_place_that_cannot_be_written_is_named(name, tiny_engine_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    where = [str(tiny_engine_folder)] if name in ("package", "verify") else []
    where += ["--checkpoint", str(TINY)] if name != "package" else []
    for output in (tmp_path / "file" / "out", Path("/proc/nothing/here"), tmp_path / ("x" * 300)):
        assert main([name, *where, "--report" if name == "verify" else "--output", str(output)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "--debug" not in err and str(output)[:20] in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("where", [["--url", "127.0.0.1:1"], ["--engine", "nowhere"]], ids=["url", "engine"])
@pytest.mark.parametrize(
    "option",
    ["--seed -1", "--seed 18446744073709551616", "--top-k 4294967297", "--top-k -1", "--top-p 1.5", "--top-p 0", "--top-p nan",
     "--temperature -0.1", "--temperature inf", "--max-tokens 0", "--max-tokens -1", "--max-tokens 2147483648"],
)  # fmt: skip
def test_generate_checks_its_options_before_anything_else(where, option, capsys):
    name, value = option.split()
    assert main(["generate", "x", *where, name, value]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and name[2:].replace("-", "_") in err and "expected" in err


@pytest.mark.parametrize("name", ["", "a\x1b[31m", "x" * 201, "a\udcff"])
def test_a_name_that_cannot_be_shown_is_refused(name, tmp_path, capsys):
    assert main(["build", "--checkpoint", str(TINY), "--output", str(tmp_path / "out"), "--name", name]) == 2
    assert "the engine's name" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [["serve"], ["build", "--output", "engine", "--checkpoint"], ["inspect"], ["generate", "x", "--engine"]], ids=" ".join
)
def test_links_that_loop_are_words(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    assert main([*args, "loop"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "loop" in err and "--debug" not in err
    assert [path.name for path in Path().iterdir()] == ["loop"]


@pytest.mark.parametrize("path", ["a" * 300, "a\0b"])
def test_names_that_no_file_can_have_are_an_error_in_one_line(path, tmp_path, capsys):
    for args in (["build", "--checkpoint", path, "--output", str(tmp_path / "engine")], ["serve", path]):
        assert main(args) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_whose_name_cannot_be_shown_gives_one_that_can():
    assert engine_name(None, "/models/a\x1bb\udcff") == "a?b?" and engine_name(None, "/") == "ngpt"


def test_arguments_that_are_not_text_are_refused_in_words(tiny_engine_folder, capsys):
    for where in (["--url", "127.0.0.1:1"], ["--engine", str(tiny_engine_folder)]):
        assert main(["generate", "a\udcffb", *where]) == 2
        assert "surrogates not allowed" in capsys.readouterr().err
    assert main(["inspect", "no\udcff\x1b[31m/where"]) == 2
    assert r"no\udcff\x1b[31m/where" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--no-such-\x1b[31m" + "x" * 10_000])
    err = capsys.readouterr().err
    assert "\x1b" not in err and len(err) < 1500


# Output


def test_json_is_alone_on_standard_output(tiny_engine_folder, tmp_path, capsys):
    report = tmp_path / "report"
    for args in (
        ["inspect", tiny_engine_folder, "--json"],
        ["inspect", tiny_engine_folder, "--json", "--on", "8.9"],
        ["plan", "--json"],
        ["verify", tiny_engine_folder, "--checkpoint", TINY, "--decode-steps", 4, "--report", report, "--no-record", "--json"],
    ):
        assert main([str(arg) for arg in args]) == 0
        found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "pass" and (report / found["html"]).is_file()


def test_verify_does_not_write_over_the_report_that_the_engine_was_packed_with(tiny_engine_folder, tmp_path, capsys):
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine_folder, engine)
    (tmp_path / "link").symlink_to("engine")
    for report in (engine, tmp_path / "link"):
        assert main(["verify", str(engine), "--checkpoint", str(TINY), "--decode-steps", "1", "--report", str(report)]) == 2
        assert "--report is the engine's own folder" in capsys.readouterr().err
    assert main(["inspect", str(engine)]) == 0


def test_verify_is_readable_without_it(tiny_engine_folder, tmp_path, capsys):
    args = ["verify", tiny_engine_folder, "--checkpoint", TINY, "--decode-steps", 4, "--report", tmp_path, "--no-record"]
    assert main([str(arg) for arg in args]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^decode_steps +4$", out, re.M) and out.splitlines()[-1].startswith("parity   pass")
    assert max(map(len, out.splitlines())) < 300
