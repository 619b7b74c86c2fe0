"""Starting and stopping the server itself."""

from __future__ import annotations

import importlib.metadata
import os
import socket
import tempfile
import time
from pathlib import Path

import pytest

from ngpt.errors import ServerError
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
