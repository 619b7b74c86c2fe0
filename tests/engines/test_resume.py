"""`build --resume`: killed anywhere, continued from what is complete and checked, to the bytes of a build that nobody killed."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

import engines.backends.onnx
import ngpt.file_lock
from engines.build import build_engine
from engines.resume import SUFFIX, discard, resuming
from engines.store import Store
from export.journal import Journal
from ngpt.errors import BuildError
from ngpt.file_lock import locked
from scripts.cli import main
from tests.conftest import GOLDEN

GQA = GOLDEN / "gqa"
CASES = {
    "onnx": {"target": "cpu-int4"},
    "trtllm": {"target": "h100-trtllm", "tp": 2, "pp": 2},
    "trtllm-fp8": {"target": "h100-trtllm", "tp": 2, "precision": "fp8", "kv_cache": "fp8"},
}


@pytest.fixture(autouse=True)
def weights_in_a_file_of_their_own(monkeypatch):
    monkeypatch.setattr(engines.backends.onnx, "EXTERNAL_DATA_FROM", 0)
    monkeypatch.setenv("PATH", os.defpath)


def contents(folder):
    """Every file's bytes but the manifest's, which says when it was made."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "manifest.json"}


def build(output, case, **options):
    return build_engine(GQA, output=output, verify=False, resume=True, **CASES[case], **options)


def killed_at(call, output, case, **options):
    """A build in a process that is killed by its n-th write; returns whether it came so far."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's other threads are not here
        left = [call]

        def counted(function):
            def run(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return run

        import export.lowerings.onnx.external as external
        from export.trtllm.rank_file import RankFile

        Journal.record = counted(Journal.record)
        Journal.hand_over = counted(Journal.hand_over)
        RankFile.write = counted(RankFile.write)
        external.ir.LazyTensor.tofile = counted(external.ir.LazyTensor.tofile)
        try:
            build(output, case, **options)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again_it_ends_with_the_bytes_of_an_uninterrupted_build(case, tmp_path, monkeypatch):
    whole = build_engine(GQA, output=tmp_path / "whole", verify=False, **CASES[case])
    pick, kills, engine = random.Random(case), 0, tmp_path / "engine"
    while killed_at(pick.choice((2, 3, 5, 9, 17)), engine, case):
        kills += 1
        assert not engine.exists() and kills < 200
        left = [path.name for path in tmp_path.iterdir() if path.name not in ("whole", "engine")]
        assert sum(name.endswith(SUFFIX) for name in left) == 1, left
    assert kills > 5 and contents(engine) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "whole"]
    assert all(path.stat().st_nlink == 1 for path in engine.rglob("*") if path.is_file())


def continued(monkeypatch, run):
    """How many units a build found complete."""
    made = []
    usual = Journal.__init__

    def noted(self, folder):
        usual(self, folder)
        made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "__init__", noted)
        run()
    return sum(journal.continued for journal in made)


@pytest.mark.parametrize("case", CASES)
def test_what_is_complete_is_not_made_again_and_what_is_damaged_is(case, tmp_path, monkeypatch):
    whole = build_engine(GQA, output=tmp_path / "whole", verify=False, **CASES[case])
    assert killed_at(40, tmp_path / "engine", case)
    (left,) = tmp_path.glob(f".*{SUFFIX}")
    saved = shutil.copytree(left, tmp_path / "saved")
    most = continued(monkeypatch, lambda: build(tmp_path / "engine", case))
    assert most > 5 and contents(tmp_path / "engine") == contents(whole)
    for damage in ("its bytes", "the end", "the journal's end", "the files"):
        shutil.rmtree(tmp_path / "engine")
        shutil.copytree(saved, left)
        left.with_name(left.name + ".lock").touch()
        data = next(path for path in sorted(left.iterdir()) if path.name != "journal")
        if damage == "its bytes":
            content = bytearray(data.read_bytes())
            start = 0 if case == "onnx" else 8 + int.from_bytes(content[:8], "little")
            data.write_bytes(content[:start] + bytes(byte and byte ^ 1 for byte in content[start:]))
        elif damage == "the end":
            os.truncate(data, data.stat().st_size // 3)
        elif damage == "the journal's end":
            os.truncate(left / "journal", (left / "journal").stat().st_size - 7)
        else:
            data.unlink()
        found = continued(monkeypatch, lambda: build(tmp_path / "engine", case))
        assert (found < most) and contents(tmp_path / "engine") == contents(whole), damage
        assert found > 0 or damage in ("the files", "the end", "its bytes")


def test_another_checkpoint_or_target_finds_nothing_to_continue_and_removes_what_is_void(tmp_path, monkeypatch):
    other = shutil.copytree(GQA, tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    for change in ({"target": "cpu-int8"}, {"checkpoint": other}, {"name": "another"}):
        assert killed_at(40, tmp_path / "engine", "onnx")
        options = {"checkpoint": GQA, "target": "cpu-int4", "verify": False, "resume": True} | change
        assert continued(monkeypatch, lambda options=options: build_engine(output=tmp_path / "engine", **options)) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "other"]
        shutil.rmtree(tmp_path / "engine")


def test_other_code_finds_nothing_to_continue(tmp_path, monkeypatch):
    assert killed_at(40, tmp_path / "engine", "onnx")
    monkeypatch.setattr("engines.identity.code_digest", lambda: "sha256:other")
    assert continued(monkeypatch, lambda: build(tmp_path / "engine", "onnx")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_build_without_it_removes_what_a_killed_one_left_to_continue(tmp_path):
    assert killed_at(40, tmp_path / "engine", "onnx") and killed_at(40, tmp_path / ("long" * 20), "onnx")
    build_engine(GQA, "cpu-int4", tmp_path / "engine", verify=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len([name for name in left if name.startswith(".longlong")]) == 2 and len(left) == 3
    build_engine(GQA, "cpu-int4", tmp_path / ("long" * 20), verify=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_store_continues_and_prunes_what_was_killed(tmp_path, monkeypatch):
    store = tmp_path / "store"
    assert killed_at(40, None, "onnx", store=store) and not Store(store).all_keys()
    assert continued(monkeypatch, lambda: build(None, "onnx", store=store)) > 5
    (key,) = Store(store).all_keys()
    assert sorted(path.name for path in store.iterdir()) == [".locks", key]
    assert killed_at(40, None, "trtllm", store=store)
    assert main(["store", "prune", str(store), "--keep-gb", "1"]) == 0
    assert sorted(path.name for path in store.iterdir()) == [".locks", key]


def test_what_somebody_continues_now_is_neither_shared_nor_removed(tmp_path):
    parts = {"name": "x"}
    with resuming(tmp_path / "engine", parts) as journal:
        with pytest.raises(BuildError, match="is being built by another process"):
            with resuming(tmp_path / "engine", parts):
                pass
        with resuming(tmp_path / "engine", {"name": "another"}):
            pass
        discard(tmp_path)
        assert journal.folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_foreign_files_and_links_are_left_alone(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "place").mkdir()
    for name in (".x.ngpt-resume.lock", f".x.{'0' * 15}g{SUFFIX}.lock", f"x.{'0' * 16}{SUFFIX}.lock"):
        (tmp_path / "place" / name).touch()
    (tmp_path / "place" / f".y.{'0' * 16}{SUFFIX}").symlink_to("../outside")
    (tmp_path / "place" / f".y.{'0' * 16}{SUFFIX}.lock").touch()
    (tmp_path / "place" / f".z.{'0' * 16}{SUFFIX}.lock").symlink_to("../outside")
    before = sorted(path.name for path in (tmp_path / "place").iterdir())
    discard(tmp_path / "place")
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == before and (tmp_path / "outside").is_dir()


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path):
    path = tmp_path / "lock"
    with locked(path) as held:
        assert held
        path.unlink()
        with locked(path) as other:
            assert other
        with locked(path, waiting=lambda holder: None) as other:
            assert other and int(path.read_text()) == os.getpid()
    with locked(path), locked(path) as second:
        assert second is False


def test_a_lock_file_that_goes_between_opening_and_locking_is_not_the_lock(tmp_path, monkeypatch):
    path, usual, left = tmp_path / "lock", ngpt.file_lock.taken, [1]

    def taken(lock):
        if left:
            left.pop()
            path.unlink()
        return usual(lock)

    monkeypatch.setattr(ngpt.file_lock, "taken", taken)
    with locked(path) as held:
        assert held and path.exists()
        with locked(path) as other:
            assert other is False


def test_a_journal_takes_what_its_bytes_confirm(tmp_path):
    data = tmp_path / "data"
    data.write_bytes(b"abcdef")
    journal = Journal(tmp_path)
    journal.record("one", [("data", 0, 3)])
    journal.record("two", [("data", 3, 3), ("data", 0, 1)])
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'[1,2,3]\nnull\n"x"\n["three"\n{}\n\xff\n["three", "' + b"0" * 64)
    journal = Journal(tmp_path)
    journal.record("four", [("data", 0, 6)])
    journal = Journal(tmp_path)
    assert journal.complete("one", [("data", 0, 3)]) and journal.complete("two", [("data", 3, 3), ("data", 0, 1)])
    assert journal.complete("four", [("data", 0, 6)]) and journal.continued == 3
    for regions in ([("data", 0, 4)], [("data", 1, 3)], [("data", 4, 3)], [("nothing", 0, 3)], []):
        assert not journal.complete("one", regions) and not journal.complete("three", regions)
    with pytest.raises(BuildError):
        journal.record("five", [("data", 4, 3)])


def test_without_hard_links_the_file_is_moved(tmp_path, monkeypatch):
    (tmp_path / "data").write_text("x")

    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    Journal(tmp_path).hand_over("data", tmp_path / "engine")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["engine"]
