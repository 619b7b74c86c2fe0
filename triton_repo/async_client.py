"""Requests to a Triton server over gRPC, with asyncio. (tritonclient's asyncio client cannot ask for the empty final response,
without which a decoupled model's end is not told.)"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import grpc
from numpy.typing import NDArray
from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor


class Refused(Exception):
    """The server's error for one request. `status`: gRPC's, where the stream itself ended with it; else empty, for Triton says
    no status on a stream."""

    def __init__(self, message: str, status: str = "") -> None:
        super().__init__(message)
        self.status = status


class AsyncClient:
    """Several connections to one server. `connections`: HTTP/2 carries many streams on one, and the work of one thread."""

    def __init__(self, url: str, *, connections: int = 4) -> None:
        self._channels = [channel(url) for _ in range(connections)]
        self._next = 0

    async def close(self) -> None:
        """Close the connections."""
        for each in self._channels:
            await each.close()

    async def stream(
        self, model: str, arrays: dict[str, NDArray[Any]], request_id: str = ""
    ) -> AsyncGenerator[InferResult, None]:
        """The responses to one request, the empty last one left out. Left early, or cancelled, it cancels the request.

        Raises Refused.
        """
        self._next += 1
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channels[self._next % len(self._channels)])
        call = stub.ModelStreamInfer()
        whole = False
        try:
            await call.write(infer_request(model, arrays, request_id))
            while (answer := await call.read()) is not grpc.aio.EOF:
                if answer.error_message:
                    whole = True
                    raise Refused(answer.error_message)
                response = answer.infer_response
                last = response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield InferResult(response)
                if last:
                    whole = True
                    return
            raise Refused("the stream ended before the answer did", "UNAVAILABLE")
        except grpc.aio.AioRpcError as error:
            raise Refused(str(error.details()), error.code().name) from error
        finally:
            # One that has ended is closed and not cancelled: server 2.51 counts for ever on what is cancelled as it ends.
            if whole:
                await call.done_writing()
            else:
                call.cancel()

    async def ready(self, model: str) -> bool:
        """Whether the server answers that this model takes requests."""
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channels[0])
        try:
            answer = await stub.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=5.0)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.ready)


def channel(url: str) -> Any:
    """A connection of its own: channels to one address share one unless they are told not to."""
    sizes = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    return grpc.aio.insecure_channel(url, options=[("grpc.use_local_subchannel_pool", 1), *sizes])


def infer_request(model: str, arrays: dict[str, Any], request_id: str = "") -> Any:
    """The message of one request that is told its end."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, array in arrays.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        data = array.tobytes()
        if array.dtype.kind == "O":
            data = serialize_byte_tensor(array).item() if array.size else b""
        request.raw_input_contents.append(data)
    return request
