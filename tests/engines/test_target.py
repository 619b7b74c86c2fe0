"""Files under engines/targets, those of other people included."""

import shutil

import pytest

import engines.target
from engines.capacity import plan_capacity, read_spec
from engines.device import Device, target_for
from engines.target import FOLDER, TargetWarning, load_target, load_targets, target_names
from ngpt.errors import TargetError
from scripts.cli import main
from tests.conftest import GOLDEN as GOLDEN_CASES

GOOD = (FOLDER / "h100.toml").read_text(encoding="utf-8")


@pytest.fixture
def targets(tmp_path, monkeypatch):
    """A folder of targets that a test may spoil: two good ones in it."""
    folder = tmp_path / "targets"
    folder.mkdir()
    for name in ("cpu-int8", "h100"):
        shutil.copyfile(FOLDER / f"{name}.toml", folder / f"{name}.toml")
    monkeypatch.setattr(engines.target, "FOLDER", folder)
    return folder


def changed(line, new):
    assert GOOD.count(line) == 1, line
    return GOOD.replace(line, new).encode()


BROKEN = {
    "not TOML": b"[",
    "empty": b"",
    "not UTF-8": GOOD.encode() + b"# \xff\n",
    "a mark before UTF-16": GOOD.encode("utf-16"),
    "lacks a key": b"\n".join(line for line in GOOD.encode().split(b"\n") if not line.startswith(b"form")),
    "unknown key": b"surprise = 1\n" + GOOD.encode(),
    "too large": GOOD.encode() + b"#" * (1 << 16),
    "too many digits": changed("decode_batch = 32", "decode_batch = " + "9" * 5000),
    "nested too deep": b"x = " + b"[" * 20_000 + b"]" * 20_000,
    "text for a number": changed("decode_batch = 32", 'decode_batch = "32"'),
    "negative": changed("decode_batch = 32", "decode_batch = -32"),
    "number for true": changed("executed = false", "executed = 0"),
    "unknown runtime": changed('runtime = "tensorrt"', 'runtime = "abacus"'),
    "list for a text": changed('runtime = "tensorrt"', 'runtime = ["tensorrt"]'),
    "text for a list": changed('cards = ["H100"]', 'cards = "H100"'),
    "numbers in a list": changed('cards = ["H100"]', "cards = [1]"),
    "a card without letters": changed('cards = ["H100"]', 'cards = [" - "]'),
    "a key of version 0.1": b"block_size = 32\n" + GOOD.encode(),
    "unknown precision": changed('precision = "fp16"', 'precision = "fp3"'),
    "list for a precision": changed('precision = "fp16"', 'precision = ["fp16"]'),
    "unknown offer": changed('"int4"]', '"int3"]'),
    "a cache of another runtime": changed('cache = "in-place"', 'cache = "paged"'),
    "a form of another runtime": changed('form = "plugins"', 'form = "portable"'),
    "no card": GOOD.split("[gpu]")[0].encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_skipped_with_a_warning_and_refused_by_name(targets, content, capsys):
    (targets / "broken.toml").write_bytes(content)
    with pytest.warns(TargetWarning, match=r"a target is skipped: broken\.toml: .*correct .*broken\.toml, or remove it"):
        assert [target.name for target in load_targets()] == ["cpu-int8", "h100"]
    with pytest.raises(TargetError, match=r"broken\.toml: ") as caught:
        load_target("broken")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("kind", ["folder", "broken link", "loop", "pipe"])
def test_what_is_no_file_is_skipped_too(targets, kind):
    import os

    path = targets / "broken.toml"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case _:
            path.symlink_to("broken.toml" if kind == "loop" else "nowhere")
    with pytest.warns(TargetWarning, match=r"broken\.toml"):
        assert len(load_targets()) == 2


@pytest.mark.filterwarnings("always::engines.target.TargetWarning")
def test_the_commands_go_on_and_say_so_in_one_line(targets, capsys):
    (targets / "bro\x1b[31mken.toml").write_bytes(b"[")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out, err = capsys.readouterr()
    assert "usage" in out and err.count("\n") == 1 and r"bro\x1b[31mken.toml" in err and "\x1b" not in err
    assert main(["plan", "--target", "h100"]) == 0
    assert main(["plan", "--target", "bro\x1b[31mken"]) == 2
    assert "\x1b" not in "".join(capsys.readouterr())


@pytest.mark.filterwarnings("ignore::engines.target.TargetWarning")
def test_a_broken_file_does_not_keep_others_from_being_chosen(targets):
    (targets / "broken.toml").write_bytes(b"[")
    assert target_for(Device("NVIDIA H100 80GB HBM3", "9.0", 80 << 30)).name == "h100"
    with pytest.raises(TargetError, match="one of h100"):
        plan_capacity(read_spec(None), load_target("cpu-int8"), 1, 10)


def test_every_target_of_ours_is_good(recwarn):
    assert [target.name for target in load_targets()] == target_names() and not recwarn.list


def test_a_target_may_lie_in_a_file_of_ones_own(tmp_path, capsys):
    own = tmp_path / "my card.toml"
    own.write_text(GOOD.replace("memory_gb = 80", "memory_gb = 60").replace('precision = "fp16"', 'precision = "int8"', 1))
    target = load_target(own)
    assert (target.name, target.gpu.memory_gb, target.precision.name) == ("my card", 60, "int8")
    assert load_target(str(own), "bf16").precision.name == "bf16"
    assert main(["plan", "--target", str(own)]) == 0
    assert "my card, int8" in capsys.readouterr().out
    assert target_for(Device("NVIDIA H100 80GB HBM3", "9.0", 80 << 30)).name == "h100"  # and is not found by itself


def test_an_engine_is_built_verified_and_inspected_for_a_target_of_ones_own(tmp_path, capsys):
    """Its file may be gone afterwards: the engine says all that is needed of it."""
    own = tmp_path / "laptop.toml"
    own.write_text((FOLDER / "cpu-int8.toml").read_text())
    engine = tmp_path / "engine"
    assert (
        main(["build", "--checkpoint", str(GOLDEN_CASES / "gqa"), "--target", str(own), "--output", str(engine), "--no-verify"])
        == 0
    )
    own.unlink()
    assert main(["verify", str(engine), "--checkpoint", str(GOLDEN_CASES / "gqa"), "--decode-steps", "4"]) == 0
    assert main(["inspect", str(engine)]) == 0
    assert "target   laptop: onnxruntime, int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "card.toml: not a file that can be read"), (b"[", "not TOML"), (b"surprise = 1\n" + GOOD.encode(), "unknown keys")],
)
def test_a_bad_file_of_ones_own_is_refused_by_its_name(content, named, tmp_path, capsys):
    path = tmp_path / "card.toml"
    if content is not None:
        path.write_bytes(content)
    for command in (["plan"], ["build", "--checkpoint", "x", "--output", str(tmp_path / "e")]):
        assert main([*command, "--target", str(path)]) == 2
        error = capsys.readouterr().err
        assert named in error and f"correct {path}, or give another --target" in error
    assert main(["plan", "--target", str(tmp_path / "card")]) == 2
    assert "or the path of a .toml file" in capsys.readouterr().err
