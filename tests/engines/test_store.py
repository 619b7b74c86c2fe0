"""`build --store`: what is there is found and checked, anything that changes the engine changes its key, and two builders make one."""

import json
import multiprocessing
import os
import shutil
import signal
import stat
import time

import pytest

import engines.copying
import engines.identity
from engines.build import build_engine
from engines.key import key_of
from engines.runtime.manifest import read_manifest, verify_files
from engines.store import Store
from ngpt.atomic_folder import SUFFIX
from ngpt.errors import BuildError, OutputExistsError
from scripts.cli import main
from tests.conftest import GOLDEN
from tests.test_commands import HEAVY, without

GQA = GOLDEN / "gqa"


# Finding and checking


def test_what_was_built_is_found_and_not_built_again(tmp_path, monkeypatch, capsys):
    store = tmp_path / "store"
    first = build_engine(GQA, "cpu-int4", store=store, verify=False)
    assert first.parent.parent == store and read_manifest(first).parity is None

    def never(*_, **__):
        raise AssertionError("built again")

    monkeypatch.setattr("engines.build._publish", never)
    assert build_engine(GQA, "cpu-int4", store=store, verify=False) == first
    # A verdict is added to what has none, once, and belongs to the store's own engine.
    copy = build_engine(GQA, "cpu-int4", tmp_path / "copy", store=store)
    assert read_manifest(first).parity["verdict"] == "pass"
    monkeypatch.setattr("engines.build._verify_built", never)
    command = ["build", "--checkpoint", str(GQA), "--target", "cpu-int4", "--store", str(store)]
    assert main([*command, "--output", str(tmp_path / "other")]) == 0
    out, err = capsys.readouterr()
    assert "parity   pass" in out and f"found in the store: {first.parent.name}" in err
    for folder in (copy, tmp_path / "other"):
        verify_files(folder, read_manifest(folder))
        assert {path.name for path in folder.iterdir()} == {path.name for path in first.iterdir()}
    with pytest.raises(AssertionError, match="built again"):
        build_engine(GQA, "cpu-int8", store=store, verify=False)
    assert len(Store(store).entries()) == 1


def test_it_says_what_an_engine_that_is_not_there_differs_in(tmp_path, capsys):
    command = ["build", "--checkpoint", str(GQA), "--store", str(tmp_path / "store"), "--no-verify"]
    assert main([*command, "--explain"]) == 0 and "would be built" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--explain"]) == 0 and "found: " in capsys.readouterr().out
    assert main([*command, "--name", "other", "--explain"]) == 0
    assert "name: here other, there gqa" in capsys.readouterr().out
    assert main([*command, "--name", "other"]) == 0 and "differs in name: here other" in capsys.readouterr().err
    assert main(["build", "--checkpoint", str(GQA), "--output", "x", "--explain"]) == 2
    assert main(["build", "--checkpoint", str(GQA)]) == 2
    assert "--output, --store, or both" in capsys.readouterr().err


def entry_of(store, text="the engine"):
    """A store with one entry that no runtime could run: a double of a build, which these tests need not wait for."""
    parts = {"name": text, "target": {"name": "cpu"}, "weights": "sha256:1"}

    def write(folder):
        folder.mkdir()
        (folder / "model.onnx").write_text(text)
        (folder / "build.sh").write_text("#!/bin/sh\n")
        (folder / "build.sh").chmod(0o755)

    return parts, write, Store(store).obtain(parts, write)


@pytest.mark.parametrize("what", ["a byte", "a file", "the key file", "another's key file", "the engine"])
def test_a_damaged_entry_is_built_again_and_said_so(what, tmp_path, caplog):
    parts, write, engine = entry_of(tmp_path)
    other = entry_of(tmp_path, "another engine")[2]
    model = engine / "model.onnx"
    if what == "a byte":
        model.chmod(0o644)
        model.write_text("the enginf")
    elif what == "a file":
        model.unlink()
    elif what == "the key file":
        (engine.parent / "key.json").write_text("{}")
    elif what == "another's key file":
        shutil.copyfile(other.parent / "key.json", engine.parent / "key.json")
    else:
        shutil.rmtree(engine)
    built = []
    assert Store(tmp_path).obtain(parts, lambda folder: built.append(write(folder))) == engine
    assert len(built) == 1 and model.read_text() == "the engine" and "is damaged and is built again" in caplog.text
    assert Store(tmp_path).obtain(parts, lambda folder: built.append(write(folder))) == engine and len(built) == 1


def test_a_manifest_that_does_not_go_with_the_key_is_damage(tmp_path, caplog):
    engine = build_engine(GQA, "cpu-fp32", store=tmp_path, verify=False)
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["digests"]["weights"] = "sha256:other"
    (engine / "manifest.json").write_text(json.dumps(manifest))
    assert build_engine(GQA, "cpu-fp32", store=tmp_path, verify=False) == engine
    assert read_manifest(engine).digests["weights"] != "sha256:other" and "damaged" in caplog.text
    caplog.clear()
    good = (engine / "model.onnx").read_bytes()
    (engine / "model.onnx").chmod(0o644)
    (engine / "model.onnx").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert build_engine(GQA, "cpu-fp32", store=tmp_path, verify=False) == engine
    assert (engine / "model.onnx").read_bytes() == good and "SHA-256" in caplog.text


def test_an_edit_of_a_copy_leaves_the_store_as_it_is(tmp_path):
    parts, write, engine = entry_of(tmp_path / "store")
    assert not any(path.stat().st_mode & 0o222 for path in engine.iterdir())
    copy = Store(tmp_path / "store").obtain(parts, write, output=tmp_path / "copy")
    assert os.access(copy / "build.sh", os.X_OK) and not os.access(copy / "model.onnx", os.X_OK)
    for path in copy.iterdir():
        assert path.stat().st_mode & stat.S_IWUSR and path.stat().st_nlink == 1
        path.write_text("edited")
    Store(tmp_path / "store").check(Store(tmp_path / "store").read(engine.parent.name))
    with pytest.raises(OutputExistsError):
        Store(tmp_path / "store").obtain(parts, write, output=copy)


def test_files_are_cloned_where_the_file_system_can_and_copied_where_it_refuses(tmp_path, monkeypatch):
    """The ioctl is a double: the file systems of test machines rarely have it."""
    (tmp_path / "a").write_text("content")
    asked = []

    def clone(target, request, source):
        asked.append(request)
        os.write(target, os.pread(source, 100, 0))

    monkeypatch.setattr(engines.copying.fcntl, "ioctl", clone)
    (tmp_path / "to").mkdir()
    assert engines.copying._cloned(tmp_path / "a", tmp_path / "to" / "a") and (tmp_path / "to" / "a").read_text() == "content"

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(engines.copying.fcntl, "ioctl", refuse)
    assert not engines.copying._cloned(tmp_path / "a", tmp_path / "to" / "b") and asked == [0x40049409]


# Two at once, and those who are killed


def build_slowly(store, log, hold):
    def write(folder):
        with open(log, "a") as file:  # noqa: PTH123
            file.write(f"{os.getpid()}\n")
        folder.mkdir()
        (folder / "model.onnx").write_text("x")
        (folder / "more").write_text("y")
        time.sleep(hold)

    Store(store).obtain({"name": "one"}, write)


def started(*args):
    process = multiprocessing.get_context("fork").Process(target=build_slowly, args=args)
    process.start()
    return process


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_builders_at_once_make_one_build(tmp_path, caplog):
    log = tmp_path / "log"
    first = started(tmp_path / "store", log, 0.6)
    wait_for(log.exists)
    build_slowly(tmp_path / "store", log, 0)
    first.join()
    assert first.exitcode == 0 and log.read_text() == f"{first.pid}\n" and len(Store(tmp_path / "store").entries()) == 1
    assert f"waiting for process {first.pid}" in " ".join(record.getMessage() for record in caplog.records)


@pytest.fixture(autouse=True)
def every_note(caplog):
    caplog.set_level("INFO", logger="ngpt")


def test_who_waits_for_one_that_is_killed_builds(tmp_path):
    log, store = tmp_path / "log", tmp_path / "store"
    first = started(store, log, 60)
    wait_for(log.exists)
    second = started(store, log, 0)
    time.sleep(0.3)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(20)
    assert second.exitcode == 0 and log.read_text() == f"{first.pid}\n{second.pid}\n"
    assert sorted(path.name for path in store.iterdir()) == [".locks", key_of({"name": "one"})]


def test_what_a_killed_builder_left_is_swept_by_a_build_of_anything(tmp_path):
    log, store = tmp_path / "log", tmp_path / "store"
    first = started(store, log, 60)
    wait_for(log.exists)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert any(path.name.endswith(SUFFIX) for path in store.iterdir()) and not Store(store).entries()
    entry_of(store)
    assert not any(path.name.endswith(SUFFIX) for path in store.iterdir()) and len(Store(store).entries()) == 1


def test_what_a_killed_verification_left_is_swept_when_its_engine_is_found(tmp_path):
    parts, write, engine = entry_of(tmp_path)
    left = engine.with_name(f".engine.0{SUFFIX}")
    left.mkdir()
    (left / "owner").touch()
    Store(tmp_path).obtain(parts, write)
    assert sorted(path.name for path in engine.parent.iterdir()) == ["engine", "key.json"]


def test_without_locks_the_first_ones_engine_counts(tmp_path, monkeypatch):
    """A file system that has none is played by a lock that everybody gets."""
    monkeypatch.setattr("ngpt.file_lock.taken", lambda lock: True)

    def write(folder):
        entry_of(tmp_path)
        folder.mkdir()
        (folder / "model.onnx").write_text("the second")

    parts = {"name": "the engine", "target": {"name": "cpu"}, "weights": "sha256:1"}
    assert (Store(tmp_path).obtain(parts, write) / "model.onnx").read_text() == "the engine"


# Housekeeping


def test_what_was_used_least_recently_is_pruned_first(tmp_path, capsys):
    keys = [entry_of(tmp_path, text)[2].parent.name for text in ("one", "two", "three")]
    for age, key in enumerate(keys):
        os.utime(tmp_path / key / "key.json", (1e9 + age, 1e9 + age))
    assert main(["store", "list", str(tmp_path), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["key"] for entry in listed] == keys[::-1] and listed[0]["used"] == "2001-09-09T01:46:42Z"
    (tmp_path / ("f" * 64)).mkdir()  # what no build of ours leaves
    assert main(["store", "check", str(tmp_path)]) == 2 and capsys.readouterr().out.count("sound") == 3
    assert main(["store", "prune", str(tmp_path), "--keep-gb", str(sum(e["bytes"] for e in listed[:2]) / 1e9)]) == 0
    assert keys[0] in capsys.readouterr().out and sorted(keys[1:]) == Store(tmp_path).all_keys()
    with Store(tmp_path).holding(keys[1]):
        assert main(["store", "prune", str(tmp_path), "--older-than", "1"]) == 0
    assert Store(tmp_path).all_keys() == [keys[1]]
    assert main(["store", "prune", str(tmp_path), "--older-than", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [".locks"] and not list((tmp_path / ".locks").iterdir())


@pytest.mark.parametrize("args", [["list"], ["prune"], ["list", "--keep-gb", "1"], ["check", "--older-than", "1"]], ids=" ".join)
def test_what_makes_no_sense_of_a_store_is_refused(args, tmp_path, capsys):
    where = tmp_path / "nowhere" if args == ["list"] else tmp_path
    assert main(["store", args[0], str(where), *args[1:]]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("place", ["file/store", "file"])
def test_a_store_that_cannot_be_written_is_an_error_in_words(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="the store"):
        build_engine(GQA, "cpu-fp32", store=tmp_path / place, verify=False)


def test_the_store_is_looked_at_without_torch_or_a_runtime(tmp_path):
    entry_of(tmp_path)
    code, out, _, asked = without(HEAVY, "store", "list", tmp_path)
    assert (code, asked) == (0, []) and "in all: 1 engine(s)" in out
