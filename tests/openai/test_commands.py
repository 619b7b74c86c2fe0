"""serve --openai-port, openai and chat as a person runs them."""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from scripts.cli import main
from tests.conftest import ROOT
from tests.openai.conftest import KEY, TEMPLATE
from triton_repo.openai.run import Frontend, Settings
from triton_repo.package import package_engine

COMMAND = [sys.executable, "-c", "import sys; from scripts.cli import main; sys.exit(main())"]


def run(*words, **options):
    return subprocess.run([*COMMAND, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def packaged(tiny_engine_folder, template_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("packaged") / "models"
    return package_engine(tiny_engine_folder, output, allow_unverified=True, threads=1, num_slots=2, chat_template=template_file)


def children(pid):
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
    return found


def test_serve_with_openais_interface_chat_and_the_end(packaged):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    words = [
        str(packaged),
        "--http-port",
        ports[0],
        "--grpc-port",
        ports[1],
        "--metrics-port",
        ports[2],
        "--openai-port",
        ports[3],
    ]
    environment = {**os.environ, "NGPT_API_KEY": KEY}
    server = subprocess.Popen(
        [*COMMAND, "serve", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    url = f"http://127.0.0.1:{ports[3]}/v1"
    try:
        lines = [server.stdout.readline() for _ in range(3)]
        assert lines[1] == f"OpenAI {url}\n" and KEY not in "".join(children(server.pid).values())
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=5)
        ask = {"model": "ensemble", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}
        expected = client.chat.completions.create(**ask).choices[0].message.content
        talk = ["chat", "--url", url, "--max-tokens", "8", "--temperature", "0"]
        talked = run(*talk, input="hello\n/retry\n/what\n/reset\nhello\n", env={**environment, "OPENAI_API_KEY": KEY})
        assert talked.returncode == 0 and talked.stdout == f"{expected}\n" * 3 and talked.stderr.count("/reset: forget") == 2
        refused = run(*talk, input="hello\n", env={**environment, "OPENAI_API_KEY": "no"})
        assert refused.returncode == 2 and "refused with 401" in refused.stderr and "Traceback" not in refused.stderr
        # Triton itself, without the interface, gives the same.
        own = ["--url", f"127.0.0.1:{ports[1]}", "--repository", packaged, "--max-tokens", "8", "--temperature", "0"]
        talked = run("chat", *own, input="hello\n/quit\n", env=environment)
        assert talked.returncode == 0 and talked.stdout == f"{expected}\n", talked.stderr
        once = run("generate", "hello", "--chat", *own, env=environment)
        assert once.returncode == 0 and once.stdout == f"{expected}\n", once.stderr
        # The frontend dies: it is started again, and said so.
        (frontend,) = [pid for pid, line in children(server.pid).items() if "openai" in line]
        os.kill(frontend, signal.SIGKILL)
        assert "frontend has died: starting again" in server.stderr.readline()
        assert client.chat.completions.create(**ask).choices[0].message.content == expected
        # So does the server behind it.
        (triton,) = [pid for pid, line in children(server.pid).items() if "tritonserver" in line]
        os.kill(triton, signal.SIGKILL)
        assert "the Triton server has died: starting again" in server.stderr.readline()
        assert "answers again" in server.stderr.readline()
        assert client.chat.completions.create(**ask).choices[0].message.content == expected
        # What is in flight as it is told to stop is answered whole, through both.
        long = client.with_options(timeout=60, max_retries=0)
        stream = long.completions.create(
            model="ensemble", prompt="x", max_tokens=400, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = [next(iter(stream))]
        server.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason == "length"
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.stdout.close()
        server.stderr.close()
        server.wait()


def test_the_frontend_alone_before_a_server_that_is_not_there(packaged, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    process = subprocess.Popen(
        [*COMMAND, "openai", str(packaged), "--url", "127.0.0.1:1", "--port", str(port)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline().decode() == f"OpenAI http://127.0.0.1:{port}/v1\n"
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
                raise AssertionError("healthy without a server")
            except urllib.error.HTTPError as error:
                assert error.code == 503
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="ensemble", prompt="x", stream=stream)
            assert caught.value.status_code == 503 and caught.value.code == "unavailable"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def test_a_frontend_that_is_left_while_it_starts_again_leaves_no_process(packaged):
    said = []
    with Frontend(Settings(packaged, "127.0.0.1:1", port=0), said.append) as frontend:
        port = str(frontend.settings.port)
        os.kill(frontend.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    left = [line for line in children(os.getpid()).values() if "openai" in line and port in line]
    assert said == ["OpenAI's frontend has died: starting again"] and not left


def test_chat_with_an_engine_folder(tiny_engine_folder, template_file):
    words = ["chat", "--engine", tiny_engine_folder, "--chat-template", template_file, "--max-tokens", "6", "--temperature", "0"]
    talked = run(*words, input="hello\n/system be brief\nhello\n/quit\nnever\n")
    assert talked.returncode == 0, talked.stderr
    first, second = talked.stdout.split("\n\n")[0], talked.stdout
    assert first and second.count("\n") >= 2
    none = run("chat", "--engine", tiny_engine_folder, input="hello\n")
    assert none.returncode == 2 and "has no chat template. give one with --chat-template" in none.stderr
    assert run("chat", "--url", "127.0.0.1:8001", input="").returncode == 2
    gone = run("chat", "--url", "http://127.0.0.1:1/v1", input="")
    assert gone.returncode == 2 and "no server answers" in gone.stderr and gone.stderr.count("\n") == 1


def test_generate_takes_a_message(tiny_engine_folder, packaged, tmp_path, capsys):
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine_folder, engine)
    (engine / "chat_template.jinja").write_text(TEMPLATE)
    assert main(["generate", "hello", "--chat", "--engine", str(engine), "--max-tokens", "6"]) == 0
    said = capsys.readouterr().out
    assert main(["generate", "<|user|>hello\n<|assistant|>", "--engine", str(engine), "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == said
    assert main(["generate", "hello", "--chat", "--url", "127.0.0.1:1"]) == 2
    assert "--repository, which has the template" in capsys.readouterr().err


def test_options_that_would_not_be_looked_at_are_refused(tiny_engine_folder, packaged, capsys):
    for words, name in (
        (["--engine", str(tiny_engine_folder), "--repository", str(packaged)], "--repository"),
        (["--chat-template", "x"], "--chat-template"),
        (["--repository", str(packaged), "--model", "nobody"], "--model"),
        (["--repository", str(packaged), "--url", "http://127.0.0.1:1"], "the server's address"),
        (["--url", "127.0.0.1:8001"], "the server's address"),
    ):
        assert main(["chat", *words]) == 2
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 1, said


def test_an_address_that_others_reach_wants_a_key(packaged, capsys, monkeypatch):
    monkeypatch.delenv("NGPT_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        assert main(["openai", str(packaged), "--host", host, "--port", "0"]) == 2
        assert "expected a key for clients" in capsys.readouterr().err


def until(master, wanted, seconds=60):
    """What the terminal has shown when it shows this."""
    said, deadline = b"", time.monotonic() + seconds
    while wanted not in said:
        assert time.monotonic() < deadline, said
        if select.select([master], [], [], 0.2)[0]:
            said += os.read(master, 4096)
    return said


def test_ctrl_c_in_a_terminal_stops_the_answer_and_not_the_program(tiny_engine_folder, template_file):
    master, slave = os.openpty()
    words = ["chat", "--engine", str(tiny_engine_folder), "--chat-template", str(template_file), "--temperature", "0"]
    talk = subprocess.Popen([*COMMAND, *words], cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    try:
        until(master, b"> ")
        os.write(master, b"hello\n")
        until(master, b"hello\r\n")
        os.read(master, 1)  # the answer has begun
        talk.send_signal(signal.SIGINT)
        until(master, b" [stopped]\r\n> ")
        time.sleep(0.3)  # Python's reading of a line notices a signal only once it waits
        talk.send_signal(signal.SIGINT)
        until(master, b"/quit or Ctrl-D ends\r\n> ")
        os.write(master, b"/what\n")
        until(master, b"/reset: forget")
        os.write(master, b"/quit\n")
        assert talk.wait(30) == 0
    finally:
        talk.kill()
        talk.wait()
        os.close(master)


def test_the_template_travels_with_the_engine_and_the_repository(tiny_engine_folder, packaged, tmp_path):
    assert (packaged / "ensemble" / "1" / "tokenizer" / "chat_template.jinja").read_text() == TEMPLATE
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine_folder, engine)
    (engine / "chat_template.jinja").write_text("own")
    made = package_engine(engine, tmp_path / "models", allow_unverified=True)
    assert (made / "ensemble" / "1" / "tokenizer" / "chat_template.jinja").read_text() == "own"
    for bad in (b"\xff", b"", b"x" * (2 << 20)):
        (tmp_path / "bad").write_bytes(bad)
        assert (
            main(
                [
                    "package",
                    str(engine),
                    "--output",
                    str(tmp_path / "no"),
                    "--allow-unverified",
                    "--chat-template",
                    str(tmp_path / "bad"),
                ]
            )
            == 2
        )
    assert (
        main(["package", str(engine), "--output", str(tmp_path / "no"), "--allow-unverified", "--chat-template", "nowhere"]) == 2
    )


def test_body_sizes_are_bounded_while_they_are_read(front):
    host, port = front.url.removeprefix("http://").removesuffix("/v1").split(":")
    big = json.dumps({"model": "tiny", "prompt": "x" * (2 << 20)}).encode()
    headers = {"Authorization": f"Bearer {KEY}"}
    for chunked in (False, True):
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        body = iter([big[at : at + 65536] for at in range(0, len(big), 65536)]) if chunked else big
        try:
            connection.request("POST", "/v1/completions", body, headers, encode_chunked=chunked)
            answer = connection.getresponse()
            assert answer.status == 413 and json.load(answer)["error"]["type"] == "invalid_request_error"
        except (BrokenPipeError, ConnectionResetError):
            assert chunked  # answered and closed before all was sent
        finally:
            connection.close()
    assert front.client().models.list().data


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"null", b'{"model": "tiny"}', b'{"model": 5, "prompt": "x"}',
                                  b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "tiny", "prompt": [[1.5]]}', b'{"model": "tiny", "prompt": []}'])  # fmt: skip
def test_hostile_bodies_are_typed_errors(front, body):
    request = urllib.request.Request(front.url + "/completions", body, {"Authorization": f"Bearer {KEY}"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    text = caught.value.read().decode()
    assert caught.value.code == 400 and set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in text and len(text) < 1500
