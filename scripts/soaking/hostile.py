"""Requests that mean no good: random tensors, random JSON, raw bytes. Every one is answered by an error that has a type and names
no file of the server, or is a right request by chance; and the server serves on."""

from __future__ import annotations

import asyncio
import collections
import json
import random
import re
import string
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2_grpc

from scripts.soaking.faults import answers
from scripts.soaking.served import memory_of_models, private_bytes
from triton_repo.async_client import channel, infer_request
from triton_repo.interface import MODEL, declared
from triton_repo.openai.requests import ChatRequest, CompletionRequest
from triton_repo.openai.run import Frontend, Settings
from triton_repo.server import TritonServer
from triton_repo.serving_inputs import NUMPY

LEAK = re.compile(r"Traceback|File \"|/(?:tmp|home|root|usr|opt|work|models)/|\.py\b")
GRPC_TYPED = (
    "INVALID_ARGUMENT",
    "UNAVAILABLE",
    "NOT_FOUND",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "OUT_OF_RANGE",
)
HTTP_TYPED = ("200", "400", "401", "404", "405", "413", "415", "422", "429", "501", "503")
Note = Callable[[str, str, str, bool], None]
"""Told of each request: how it came, with what status it ended, in which words, and whether that is an error with a type."""
MODELS = ("ensemble", "tensorrt_llm", "preprocessing", "postprocessing", "nobody", "", "../ensemble", "ensemble\0")


def hostile(server: TritonServer, *, requests: int) -> dict[str, object]:
    """A half of gRPC, a third of HTTP, the rest raw bytes on either port."""
    return _quarters(server, requests, lambda count, seed: _many(server, count, seed), lambda: memory_of_models(server))


Run = tuple[collections.Counter[str], set[str], set[str]]
"""How requests ended, and the words of those without a type, and of those that showed what they must not."""


def _quarters(
    server: TritonServer, requests: int, run: Callable[[int, int], Coroutine[Any, Any, Run]], used: Callable[[], int]
) -> dict[str, object]:
    """The requests in four parts. Buffers grow to the largest requests at first, and must not grow on.

    The server's own process is told apart: 2.51 keeps a kilobyte or two of many a malformed gRPC request, which nothing here
    can help.
    """
    endings, untyped, leaks, sizes = collections.Counter[str](), set[str](), set[str](), [used()]
    own = private_bytes(server.pid)
    for quarter in range(4):
        found, strange, shown = asyncio.run(run(requests // 4, quarter))
        endings += found
        untyped |= strange
        leaks |= shown
        sizes.append(used())
    return {
        "requests": requests // 4 * 4,
        **dict(endings),
        "untyped": len(untyped),
        "paths or tracebacks": len(leaks),
        "of them": sorted(untyped | leaks)[:5],
        "not answered afterwards": 0 if answers(server) else 1,
        "grown by a request, the server, KB": round((private_bytes(server.pid) - own) / 1e3 / max(requests, 1), 2),
        "memory by quarters, MB": [round(size / 1e6) for size in sizes],
        "grown in the last quarter, MB": round((sizes[4] - sizes[3]) / 1e6, 1),
    }


class _Notes:
    """How requests ended, and the words of those without a type and of those that showed what they must not."""

    def __init__(self) -> None:
        self.endings = collections.Counter[str]()
        self.untyped: set[str] = set()
        self.leaks: set[str] = set()

    def add(self, kind: str, status: str, text: str, typed: bool) -> None:
        """One request, as `Note` has it."""
        self.endings[f"{kind}: {status}"] += 1
        if not typed:
            self.untyped.add(f"{kind} {status}: {text[:200]}")
        if LEAK.search(text):
            self.leaks.add(f"{kind}: {text[:200]}")


def openai(models: Path, *, requests: int) -> dict[str, object]:
    """The same against OpenAI's interface, before a server of its own: every answer is JSON, and every error has its form."""
    with TritonServer(models, start_timeout=120) as server, Frontend(Settings(models, server.grpc_url, port=0)) as frontend:
        address = frontend.base_url.removeprefix("http://").removesuffix("/v1")
        used = lambda: memory_of_models(server) + private_bytes(frontend.pid)  # noqa: E731
        return _quarters(server, requests, lambda count, seed: _many_of_openai(address, count, seed), used)


async def _many_of_openai(address: str, requests: int, seed: int) -> tuple[collections.Counter[str], set[str], set[str]]:
    notes, gate = _Notes(), asyncio.Semaphore(32)

    def note(kind: str, status: str, text: str, typed: bool) -> None:
        form = status in ("200", "closed") or text.startswith('{"error":{"message"')
        notes.add(kind, status, text, typed and form)

    async def one(number: int) -> None:
        pick = random.Random(seed * 1_000_003 + number)
        async with gate:
            try:
                if number % 8 == 0:
                    await _raw(address, pick)
                    notes.endings["raw bytes"] += 1
                else:
                    path = pick.choice(("chat/completions", "completions", "completions", "embeddings", "models", "nobody"))
                    await _http(address, f"/v1/{path}", openai_body(pick), note)
            except TimeoutError:
                note("no answer", "hung", "", False)

    for first in range(0, requests, 1000):
        await asyncio.gather(*(one(number) for number in range(first, min(first + 1000, requests))))
    return notes.endings, notes.untyped, notes.leaks


def openai_body(pick: random.Random) -> bytes:
    """Mostly an object with fields of the interface."""
    if pick.random() < 0.1:
        return pick.choice((b"", b"{", b"[" * 5000, b'{"model":' * 3000, b"\xff\xfe", b"null", pick.randbytes(200)))
    body: dict[str, Any] = {"model": "ensemble", "max_tokens": 2}
    body |= {"prompt": "x"} if pick.random() < 0.5 else {"messages": [{"role": "user", "content": "x"}]}
    fields = [*ChatRequest.model_fields, *CompletionRequest.model_fields, "best_of", "lora", "nobody"]
    for name in pick.sample(sorted(set(fields)), pick.randrange(0, 4)):
        body[name] = value(pick, 2)
    return json.dumps(body).encode()


async def _many(server: TritonServer, requests: int, seed: int) -> tuple[collections.Counter[str], set[str], set[str]]:
    line = channel(server.grpc_url)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(line)
    notes, gate = _Notes(), asyncio.Semaphore(32)
    note = notes.add

    async def one(number: int) -> None:
        pick = random.Random(seed * 1_000_003 + number)
        async with gate:
            try:
                if number % 6 < 3:
                    await _grpc(stub, pick, note)
                elif number % 6 < 5:
                    kind = pick.choice(("generate", "generate_stream", "infer", ""))
                    await _http(server.http_url, f"/v2/models/ensemble/{kind}", json_body(pick), note)
                else:
                    await _raw(pick.choice((server.http_url, server.grpc_url, server.metrics_url)), pick)
                    notes.endings["raw bytes"] += 1
            except TimeoutError:
                note("no answer", "hung", "", False)

    for first in range(0, requests, 1000):
        await asyncio.gather(*(one(number) for number in range(first, min(first + 1000, requests))))
    await line.close()
    return notes.endings, notes.untyped, notes.leaks


async def _grpc(stub: Any, pick: random.Random, note: Note) -> None:
    model = "ensemble" if pick.random() < 0.7 else pick.choice(MODELS)
    request = infer_request(model, tensors(pick), "r" + str(pick.randrange(1000)))
    if pick.random() < 0.1 and request.inputs:
        request.inputs.add().CopyFrom(request.inputs[0])  # one without contents
    call = stub.ModelStreamInfer()
    ended = False
    try:
        await call.write(request)
        while (answer := await asyncio.wait_for(call.read(), 60.0)) is not grpc.aio.EOF:
            if answer.error_message:  # on a stream the status is in Triton's words
                note("grpc", "refused", answer.error_message, True)
                ended = True
                return
            if answer.infer_response.parameters["triton_final_response"].bool_param:
                note("grpc", "answered", "", True)
                ended = True
                return
        note("grpc", "ended without an answer", "", False)
    except grpc.aio.AioRpcError as error:
        note("grpc", error.code().name, str(error.details()), error.code().name in GRPC_TYPED)
    finally:
        if ended and pick.random() < 0.95:
            await call.done_writing()
        else:
            call.cancel()


def tensors(pick: random.Random) -> dict[str, Any]:
    """A handful of inputs of the model with values, types and shapes of any kind."""
    known = declared(MODEL)
    names = pick.sample(sorted(known), pick.randrange(0, 6))
    if pick.random() < 0.8:
        names.append(pick.choice(("text_input", "input_ids")))
    made = {}
    for name in names:
        dtype = NUMPY[known[name].dtype]
        if pick.random() < 0.1:
            dtype = pick.choice(list(NUMPY.values()))
        shape = pick.choice(((1, 1), (1, 1), (1, 1), (1,), (1, 3), (1, 2, 2), (2, 1), (1, 0)))
        if np.dtype(dtype).kind == "O":
            flat: list[Any] = [blob(pick) for _ in range(int(np.prod(shape)))]
            array = np.empty(len(flat), object)
            array[:] = flat
        else:
            size = int(np.prod(shape))
            array = np.asarray([pick.choice((0, 1, 2, 7)) for _ in range(size)], dtype)
            if np.dtype(dtype).kind != "b" and pick.random() < 0.4:
                array = np.frombuffer(pick.randbytes(size * np.dtype(dtype).itemsize), dtype)
        made[name] = array.reshape(shape)
    if "max_tokens" not in made and pick.random() < 0.9:
        made["max_tokens"] = np.asarray([[pick.choice((0, 1, 3, -1))]], np.int32)
    return made


def blob(pick: random.Random) -> bytes:
    """Text, broken text, or bytes."""
    kind = pick.randrange(5)
    if kind == 0:
        return pick.randbytes(pick.randrange(40))
    if kind == 1:
        return ("\ud7ff\U0010ffff\u202e\0" * pick.randrange(9)).encode()
    if kind == 2:
        return b"a " * pick.choice((1, 100, 100_000))
    if kind == 3:
        return json.dumps(value(pick, 3)).encode()
    return "".join(pick.choices(string.printable, k=pick.randrange(60))).encode()


def value(pick: random.Random, depth: int) -> Any:
    """JSON of any kind."""
    kind = pick.randrange(9 if depth else 7)
    simple = (None, True, pick.randrange(-5, 9), 2**63, 1e308, "x" * pick.randrange(30), -0.5)
    if kind < 7:
        return simple[kind]
    if kind == 7:
        return [value(pick, depth - 1) for _ in range(pick.randrange(4))]
    return {pick.choice(("a", "text_input", "type", "role", "\0")): value(pick, depth - 1) for _ in range(pick.randrange(4))}


def json_body(pick: random.Random) -> bytes:
    """Mostly an object with names that the model has."""
    if pick.random() < 0.1:
        return pick.choice((b"", b"{", b"[" * 5000, b'{"text_input":' * 3000, b"\xff\xfe", b"null", pick.randbytes(200)))
    body: dict[str, Any] = {"text_input": "x", "max_tokens": 2} if pick.random() < 0.7 else {}
    for name in pick.sample(sorted(declared(MODEL)), pick.randrange(0, 4)):
        body[name] = value(pick, 2)
    return json.dumps(body).encode()


async def _http(address: str, path: str, body: bytes, note: Note, headers: str = "") -> None:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{headers}Content-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        answer = await asyncio.wait_for(reader.read(-1), 60.0)
    except (ConnectionError, BrokenPipeError):
        answer = b""
    finally:
        writer.close()
    status = answer[9:12].decode(errors="replace")
    text = answer.partition(b"\r\n\r\n")[2].decode("utf-8", "replace")
    # Triton's own reading of JSON answers 500 where a value is not of the declared type; what a model of ours fails with says so.
    its_own = status == "500" and text.startswith('{"error":') and "the model failed" not in text
    what = f"{status} by Triton's reading" if its_own else status or "closed"
    note("http", what, text if status != "200" else "", its_own or status in HTTP_TYPED)


async def _raw(address: str, pick: random.Random) -> None:
    """Bytes of no protocol, or of half a protocol; nothing need come back."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        starts = (
            b"",
            b"GET / HTTP/1.1\r\n",
            b"POST /v2/models/ensemble/infer HTTP/1.1\r\nInference-Header-Content-Length: 99\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        )
        writer.write(pick.choice(starts) + pick.randbytes(pick.randrange(1, 500)))
        await writer.drain()
        if pick.random() < 0.3:
            await asyncio.wait_for(reader.read(100), 0.05)
    except (OSError, TimeoutError):
        pass
    finally:
        writer.close()
