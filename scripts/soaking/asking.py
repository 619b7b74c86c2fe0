"""One request in each of the ways that clients have, and how it ended."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

import grpc
import numpy as np
from tritonclient.grpc import InferResult, service_pb2_grpc

from scripts.soaking.served import Task, stop_tensors
from triton_repo.async_client import channel, infer_request
from triton_repo.client import token_tensors

Ending = Literal["right", "error", "wrong", "hung", "left"]
"""Whole and equal to the undisturbed answer; an error that says so; **called a success and not the whole answer**; nothing for
too long; given up by the client."""
WAYS = ("grpc", "grpc-whole", "tokens", "alias", "http", "http-stream")
LEAVES = ("cancel", "stop", "reset")


class Asker:
    """Clients of one server. `patience`: seconds without anything after which a request counts as hung."""

    def __init__(self, grpc_url: str, http_url: str, *, patience: float = 60.0, channels: int = 8) -> None:
        self._http = http_url.split(":")
        self._patience = patience
        self._channels = [channel(grpc_url) for _ in range(channels)]
        self._next = 0
        self.last_error = ""

    async def close(self) -> None:
        """Close the channels."""
        for each in self._channels:
            await each.close()

    async def ask(self, task: Task, way: str, leave_after: int | None = None, leave: str = "cancel") -> Ending:
        """Ask, and say how it ended. `leave_after`: pieces after which the client leaves, by `leave`."""
        try:
            if way.startswith("http"):
                return await self._over_http(task, way == "http-stream", leave_after)
            return await self._over_grpc(task, way, leave_after, leave)
        except TimeoutError:
            return "hung"
        except (OSError, EOFError, asyncio.IncompleteReadError) as error:
            self.last_error = str(error)[:300]
        except grpc.aio.AioRpcError as error:
            self.last_error = f"{error.code().name}: {error.details()}"[:300]
        return "error"

    async def _over_grpc(self, task: Task, way: str, leave_after: int | None, leave: str) -> Ending:
        client, self._next = self._channels[self._next % len(self._channels)], self._next + 1
        by_tokens = way in ("tokens", "alias")
        if by_tokens:
            options: dict[str, Any] = {"stream": True, "exclude_input": True, "ignore_eos": True}
            arrays = token_tensors(task.ids, task.length, (), (), options)
        else:
            arrays = text_tensors(task, stream=way != "grpc-whole")
        model, name = "tensorrt_llm" if way == "alias" else "ensemble", uuid.uuid4().hex
        more: asyncio.Queue[Any] = asyncio.Queue()
        await more.put(infer_request(model, arrays, name))
        call = service_pb2_grpc.GRPCInferenceServiceStub(client).ModelStreamInfer(_until_none(more))
        text, tokens, pieces, ended = b"", [], 0, False
        try:
            while True:
                answer = await asyncio.wait_for(call.read(), self._patience)
                if answer is grpc.aio.EOF:
                    raise EOFError("the stream ended without a final response")
                if answer.error_message:
                    raise EOFError(answer.error_message)
                response, result = answer.infer_response, InferResult(answer.infer_response)
                if response.id != name:
                    continue  # the end of the request to stop
                if (piece := result.as_numpy("text_output")) is not None:
                    text += piece.reshape(-1)[0]
                if (ids := result.as_numpy("output_ids")) is not None:
                    tokens += ids.reshape(-1).tolist()
                if response.parameters["triton_final_response"].bool_param:
                    break
                pieces += 1
                if pieces == leave_after:
                    if leave == "cancel":
                        return "left"
                    await more.put(infer_request(model, stop_tensors(), name))
                    return "left" if await self._drain(call, name) else "hung"
            await more.put(None)
            ended = leave != "end"
        finally:
            # A client that cancels just as its stream ends is the worst for this server; some do.
            if not ended:
                call.cancel()
        whole = tuple(tokens) == task.tokens if by_tokens else text.decode() == task.text
        return "right" if whole else "wrong"

    async def _drain(self, call: Any, name: str) -> bool:
        """Read on until the request that was stopped has ended."""
        while (answer := await asyncio.wait_for(call.read(), self._patience)) is not grpc.aio.EOF:
            response = answer.infer_response
            if answer.error_message or (response.id == name and response.parameters["triton_final_response"].bool_param):
                return True
        return False

    async def _over_http(self, task: Task, stream: bool, leave_after: int | None) -> Ending:
        kind = "generate_stream" if stream else "generate"
        asked = {"text_input": task.prompt, "max_tokens": task.length, "ignore_eos": True, "stream": stream}
        body = json.dumps(asked | {"exclude_input_in_output": True}).encode()
        reader, writer = await asyncio.open_connection(self._http[0], int(self._http[1]))
        try:
            head = f"POST /v2/models/ensemble/{kind} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            if leave_after is not None:
                await asyncio.wait_for(reader.read(64 * leave_after), self._patience)
                # Closed with a reset, as by a client that was killed.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return "left"
            status = (await asyncio.wait_for(reader.readline(), self._patience)).split()
            if len(status) < 2:
                raise EOFError("the connection closed before an answer")
            headers = {}
            while line := (await asyncio.wait_for(reader.readline(), self._patience)).strip():
                key, _, value = line.decode().partition(":")
                headers[key.lower()] = value.strip()
            data = await _body(reader, headers, self._patience)
            if status[1] != b"200":
                raise OSError(data.decode("utf-8", "replace"))
            events = (
                [json.loads(line[5:]) for line in data.split(b"\n") if line.startswith(b"data:")]
                if stream
                else [json.loads(data)]
            )
            if wrong := [event["error"] for event in events if "error" in event]:
                raise OSError(wrong[0])
            return "right" if "".join(event["text_output"] for event in events) == task.text else "wrong"
        finally:
            writer.close()


async def _until_none(queue: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while (item := await queue.get()) is not None:
        yield item


async def _body(reader: asyncio.StreamReader, headers: dict[str, str], patience: float) -> bytes:
    """The whole body; a chunked one that is cut raises IncompleteReadError."""
    if headers.get("transfer-encoding") != "chunked":
        return await asyncio.wait_for(reader.readexactly(int(headers["content-length"])), patience)
    data = b""
    while size := int(await asyncio.wait_for(_line(reader), patience), 16):
        data += await asyncio.wait_for(reader.readexactly(size), patience)
        await reader.readexactly(2)
    return data


async def _line(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n")


def text_tensors(task: Task, *, stream: bool) -> dict[str, np.ndarray[Any, Any]]:
    """A request for text."""
    return {
        "text_input": np.asarray([[task.prompt.encode()]], object),
        "max_tokens": np.asarray([[task.length]], np.int32),
        **{
            name: np.asarray([[value]])
            for name, value in (("stream", stream), ("ignore_eos", True), ("exclude_input_in_output", True))
        },
    }
