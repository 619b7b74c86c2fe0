"""A folder that appears whole or not at all, and what is done about the remains of one."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ngpt.atomic_folder import SUFFIX, new_folder, sweep
from ngpt.errors import BuildError, OutputExistsError, PackagingError, os_trouble
from tests.conftest import ROOT

HOLD = """
import pathlib, sys, time
from ngpt.atomic_folder import new_folder
with new_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half").write_text("written")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process in the midst of writing `tmp_path / "other"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "other")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("end", ["", "/"])
def test_it_appears_whole_with_the_permissions_of_any_new_folder(tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    with new_folder(f"above/out{end}") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "above" / "out").exists()
        monkeypatch.chdir("/")  # a relative output is relative to where it was asked for
    (tmp_path / "plain").mkdir()
    assert names(tmp_path / "above") == ["out"] and names(tmp_path / "above" / "out") == ["file"]
    assert (tmp_path / "above" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, BrokenPipeError])
def test_an_error_leaves_nothing_not_even_the_folders_above(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "a" / "b" / "out") as folder:
        (folder / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, None])
def test_trouble_with_the_disk_is_an_error_of_the_kind_asked_for_with_a_remedy(tmp_path, code):
    error = OSError("12 requested and 7 written") if code is None else OSError(code, os.strerror(code))
    with (
        pytest.raises(PackagingError, match=r"out cannot be written: found .*\. [a-z]") as caught,
        new_folder(tmp_path / "out", kind=PackagingError),
    ):
        raise error
    assert caught.value.remedy == os_trouble(error)[1] and names(tmp_path) == []


def test_a_copy_onto_a_full_disk_does_not_blame_the_file_it_read():
    assert os_trouble(OSError(errno.ENOSPC, "No space left on device", "/read/from/here"))[0] == "No space left on device"
    assert "/not/there" in os_trouble(FileNotFoundError(errno.ENOENT, "No such file", "/not/there"))[0]


@pytest.mark.parametrize("make", ["file", "folder", "link", "broken link"])
def test_what_is_there_stays(tmp_path, make):
    out = tmp_path / "out"
    match make:
        case "file":
            out.write_text("mine")
        case "folder":
            out.mkdir()
        case _:
            (tmp_path / "elsewhere").mkdir()
            out.symlink_to("elsewhere" if make == "link" else "nowhere")
    before = names(tmp_path)
    with pytest.raises(OutputExistsError, match="out exists"), new_folder(out):
        raise AssertionError("not reached")
    assert names(tmp_path) == before
    if make != "folder":
        with pytest.raises(OutputExistsError), new_folder(out, into_empty=True):
            raise AssertionError("not reached")


def test_an_empty_folder_is_filled_where_that_is_allowed(tmp_path):
    with new_folder(tmp_path / "new", into_empty=True):
        (tmp_path / "new").mkdir()  # by somebody else, meanwhile
    with new_folder(tmp_path / "new", into_empty=True) as folder:
        (folder / "file").write_text("x")
    with pytest.raises(OutputExistsError, match="a new or empty folder"), new_folder(tmp_path / "new", into_empty=True):
        raise AssertionError("not reached")
    assert names(tmp_path / "new") == ["file"]


def test_of_two_at_once_one_wins_and_the_other_says_so(tmp_path):
    with pytest.raises(OutputExistsError, match="appeared while"), new_folder(tmp_path / "out") as late:
        (late / "late").write_text("x")
        with new_folder(tmp_path / "out") as early:
            (early / "early").write_text("x")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["early"]


@pytest.mark.parametrize("name", ["a" * 256, "ab\0c", "..", "x/..", "file/x"])
def test_names_that_cannot_be_are_refused_before_anything_is_made(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BuildError), new_folder(tmp_path / name):
        raise AssertionError("not reached")
    assert names(tmp_path) == ["file"]


def test_the_longest_name_a_disk_takes_is_no_trouble(tmp_path):
    with new_folder(tmp_path / ("ü" * 127 + "x")):
        pass
    assert names(tmp_path) == ["ü" * 127 + "x"]


def test_too_little_room_is_said_at_once(tmp_path):
    with pytest.raises(BuildError, match="not enough room .* MB free"), new_folder(tmp_path / "out", needed=1 << 62):
        raise AssertionError("not reached")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes_with_the_next_folder_made_beside_it(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".other.") and left.name.endswith(SUFFIX) and (left / "folder" / "half").exists()
    with new_folder(tmp_path / "out"):
        assert not left.exists()
    assert names(tmp_path) == ["out"]


def test_a_living_process_keeps_its_folder(tmp_path, holder):
    (before,) = tmp_path.iterdir()
    assert sweep(tmp_path) == [] and (before / "folder" / "half").exists()


def test_only_what_is_surely_ours_is_swept(tmp_path, holder):
    holder.kill()
    holder.wait()
    (left,) = tmp_path.iterdir()
    owner = (left / "owner").read_text()
    kept = [f".other{SUFFIX}", f".unlocked{SUFFIX}", f".link{SUFFIX}", f".file{SUFFIX}"]
    (tmp_path / kept[0]).mkdir()
    (tmp_path / kept[0] / "owner").write_text("another-machine\n00000000-0000-0000-0000-000000000000")
    (tmp_path / kept[1]).mkdir()
    (tmp_path / kept[1] / "mine").write_text("keep")
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "owner").write_text(owner)
    (tmp_path / kept[2]).symlink_to("aside")
    (tmp_path / kept[3]).write_text("keep")
    gone = [f".empty{SUFFIX}", f".killed-early{SUFFIX}", left.name]
    (tmp_path / gone[0]).mkdir()
    (tmp_path / gone[1]).mkdir()
    (tmp_path / gone[1] / "owner").touch()
    assert [path.name for path in sweep(tmp_path)] == sorted(gone)
    assert names(tmp_path) == sorted([*kept, "aside"]) and names(tmp_path / "aside") == ["owner"]


def test_a_sweep_between_two_steps_of_making_one_costs_only_another_try(tmp_path, monkeypatch):
    real, swept = os.open, []

    def sweeping(path, *args, **kwargs):
        if Path(path).name == "owner" and not swept:
            swept.extend(sweep(tmp_path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", sweeping)
    with new_folder(tmp_path / "out"):
        pass
    assert len(swept) == 1 and names(tmp_path) == ["out"]


def test_a_file_system_without_locks_still_gets_its_folder(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with new_folder(tmp_path / "out") as folder:
        assert sweep(tmp_path) == [] and folder.exists()
    assert names(tmp_path) == ["out"]
