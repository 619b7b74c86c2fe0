"""Starting and stopping the server itself."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import socket
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from ngpt.errors import ServerError
from scripts.soaking.asking import Asker
from scripts.soaking.served import Task
from triton_repo.client import generate_text, stream_text
from triton_repo.server import TritonServer, check_numpy


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_start_and_stop_again_and_again(repository, tmp_path):
    server = TritonServer(repository, log_path=tmp_path / "log.txt", start_timeout=90)
    texts = []
    for _ in range(2):
        with server:
            pid, prefix = server.pid, server._shm_prefix
            texts.append(generate_text(server.grpc_url, "def ", max_tokens=4))
            stream = stream_text(server.grpc_url, "def ", max_tokens=400, end_id=-1)
            next(stream)
            stream.close()
            start = time.monotonic()
        assert time.monotonic() - start < 8
        assert server.pid is None and not alive(pid)
        assert not list(Path("/dev/shm").glob(f"{prefix}*"))
    assert texts[0] == texts[1]


def in_flight(server, count, expected, **options):
    """Streams that are under way in threads of their own, and what each ends with: its text, or the error."""
    found = {}

    def ask(number):
        try:
            found[number] = "".join(stream_text(server.grpc_url, "def ", max_tokens=300, ignore_eos=True, **options))
        except ServerError as error:
            found[number] = error

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


@pytest.fixture(scope="module")
def whole(served):
    return served.engine.generate_text("def ", 300, ignore_eos=True)


def test_what_is_in_flight_is_answered_before_the_server_ends(repository, whole):
    with TritonServer(repository, start_timeout=90, stop_timeout=60) as server:
        threads, found = in_flight(server, 12, whole)
        time.sleep(0.5)
        server._process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(ServerError):  # what is new is refused
            generate_text(server.grpc_url, "def ", max_tokens=1)
        for thread in threads:
            thread.join(60)
        assert [found[number] for number in range(12)] == [whole] * 12


def test_clients_that_cancel_as_their_streams_end_do_not_hold_up_the_end(repository, served):
    """Server 2.51 counts on such a request for ever, and would wait out its whole limit."""
    task = Task(
        "def ", tuple(served.engine.tokenizer.encode("def ")), 40, served.engine.generate_text("def ", 40, ignore_eos=True), ()
    )

    async def cancel_at_the_end(server):
        asker = Asker(server.grpc_url, server.http_url)
        endings = await asyncio.gather(*(asker.ask(task, "grpc") for _ in range(24)))
        await asker.close()
        return endings

    with TritonServer(repository, start_timeout=90, stop_timeout=60) as server:
        assert asyncio.run(cancel_at_the_end(server)) == ["right"] * 24
        start = time.monotonic()
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("what", ["model", "server"])
def test_what_has_died_is_started_again_and_nobody_takes_a_part_for_the_whole(repository, whole, what, tmp_path):
    said = []
    server = TritonServer(repository, start_timeout=90, log_path=tmp_path / "log.txt")
    with server:
        watching = threading.Thread(target=server.watch, args=(said.append,))
        watching.start()
        url, first = server.grpc_url, server.pid
        threads, found = in_flight(server, 8, whole, timeout=60)
        time.sleep(0.5)
        os.kill(first if what == "server" else stub_of("ensemble", first), signal.SIGKILL)
        for thread in threads:
            thread.join(20)
        assert len(found) == 8 and all(answer == whole or isinstance(answer, ServerError) for answer in found.values())
        deadline = time.monotonic() + 30
        while len(said) < 2:
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        assert "has died: starting again" in said[0] and "answers again" in said[1]
        assert server.grpc_url == url and server.pid != first
        assert generate_text(url, "def ", max_tokens=300, ignore_eos=True) == whole
    watching.join(10)
    assert not watching.is_alive() and len(said) == 2


def stub_of(model, server):
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            line = (stat.parent / "cmdline").read_text()
            if int(stat.read_text().rpartition(")")[2].split()[1]) == server and f"{model}/" in line:
                return int(stat.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no process of {model}")


def test_a_server_that_dies_again_and_again_is_given_up(repository):
    said = []
    with TritonServer(repository, start_timeout=90) as server:
        threading.Thread(
            target=lambda: [os.kill(server.pid, signal.SIGKILL), time.sleep(6), os.kill(server.pid, signal.SIGKILL)]
        ).start()
        with pytest.raises(ServerError, match="has died 2 times within"):
            server.watch(said.append, most_deaths=1)
    assert len(said) == 2


def test_a_model_is_reloaded_unloaded_and_loaded_while_requests_come(repository, whole):
    models = sorted(path.name for path in repository.iterdir())
    arguments = ["--model-control-mode=explicit", *(f"--load-model={name}" for name in models)]
    with TritonServer(repository, start_timeout=90, arguments=arguments) as server:

        def change(what):
            request = urllib.request.Request(f"http://{server.http_url}/v2/repository/models/ensemble/{what}", b"{}")
            with urllib.request.urlopen(request, timeout=60) as response:
                assert response.status == 200

        for what in ("load", "load", "unload"):
            threads, found = in_flight(server, 6, whole)
            time.sleep(0.3)
            change(what)
            for thread in threads:
                thread.join(60)
            assert [found[number] for number in range(6)] == [whole] * 6, what
        change("load")
        assert generate_text(server.grpc_url, "def ", max_tokens=300, ignore_eos=True) == whole


def test_a_repository_moved_elsewhere_serves(repository, tmp_path):
    moved = tmp_path / "a b" / "models"
    moved.parent.mkdir()
    moved.symlink_to(repository)
    with TritonServer(moved, start_timeout=90) as server:
        assert generate_text(server.grpc_url, "def ", max_tokens=2)


def test_a_model_that_cannot_load_ends_the_start_with_the_log(tmp_path):
    model = tmp_path / "models" / "broken"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text('name: "broken"\nbackend: "python"\nmax_batch_size: 0\n')
    (model / "1" / "model.py").write_text("raise ValueError('broken on purpose')\n")
    server = TritonServer(tmp_path / "models", start_timeout=60)
    with pytest.raises(ServerError, match="broken on purpose"):
        server.start()
    assert server.pid is None


def test_numpy_2_is_refused(monkeypatch):
    check_numpy()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0")
    with pytest.raises(ServerError, match="expected numpy<2, found numpy 2.1.0"):
        check_numpy()


def test_a_missing_repository_is_named(tmp_path):
    with pytest.raises(ServerError, match="nowhere"):
        TritonServer(tmp_path / "nowhere")


@pytest.mark.parametrize("port", [-1, 65536, 1.5, True, "8000", None])
def test_ports_that_are_none_are_refused(tmp_path, port):
    for name in ("http_port", "grpc_port", "metrics_port"):
        with pytest.raises(ServerError, match=f"{name}: expected a port from 0"):
            TritonServer(tmp_path, **{name: port})


def test_ports_must_differ_unless_any_will_do(tmp_path):
    with pytest.raises(ServerError, match="expected three that differ, found 8000, 8001, 8000"):
        TritonServer(tmp_path, http_port=8000, grpc_port=8001, metrics_port=8000)
    TritonServer(tmp_path)


def test_a_port_in_use_is_named_before_anything_is_started(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(ServerError, match=f"port {port} cannot be had on 127.0.0.1: .*choose another"),
            TritonServer(tmp_path, grpc_port=port),
        ):
            raise AssertionError("not reached")
    TritonServer(tmp_path, grpc_port=port)


def test_a_log_that_cannot_be_written_is_named_and_leaves_no_scratch(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    server = TritonServer(tmp_path, log_path=tmp_path / "file" / "log.txt")
    with pytest.raises(ServerError, match="cannot be started: found .*file"):
        server.start()
    assert server.pid is None and list((tmp_path / "scratch").iterdir()) == []
