"""A small gRPC client of the packaged models; works with any server that offers the same interface."""

from __future__ import annotations

import collections
import contextlib
import importlib
import math
import queue
import re
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ngpt.errors import ServerError, missing_package
from triton_repo.interface import TEXT, TOKENS
from triton_repo.interface import options as rows_of
from triton_repo.serving_inputs import InputError, option_array, sequences_array

_TRITON_NAMES = {"int32": "INT32", "float32": "FP32", "uint64": "UINT64", "bool": "BOOL", "object": "BYTES"}

_STOP_SECONDS = 1.0
_URL = re.compile(r"(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
_DEAD = ("UNAVAILABLE", "UNIMPLEMENTED", "UNKNOWN", "INTERNAL")  # what gRPC itself says where no Triton server answers


class RequestRefused(ServerError):
    """The server answered with an error, or a value could not have been sent as it is. ``status`` is the gRPC status:
    "INVALID_ARGUMENT" for the latter, empty where a stream reports the text alone."""

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


def stream_text(
    url: str,
    prompt: str | bytes,
    *,
    max_tokens: int = 64,
    model: str = "ensemble",
    timeout: float = 120.0,
    request_id: str = "",
    stop_words: Sequence[str] = (),
    bad_words: Sequence[str] = (),
    **options: Any,
) -> Generator[str, None, None]:
    """Yield pieces of the completion as they arrive; joined they are the whole completion, without the prompt.

    Closing the generator before its end cancels the request and frees its slot.

    Args:
        url: ``host:port`` of the gRPC endpoint, without a scheme.
        prompt: text (bytes are sent as they are).
        timeout: seconds that may pass between two responses.
        options: temperature, top_k, top_p, seed, min_tokens, repetition_penalty, ... as in docs/serving.md.

    Raises:
        RequestRefused: a value is out of range (nothing is sent then), or the server refused or failed the request.
        ServerError: not a ``host:port``, no server there, or no answer in time. MissingPackageError: tritonclient is not
            installed.
    """
    tensors = _text_tensors(prompt, max_tokens, stop_words, bad_words, dict(**options, stream=True))
    for result in responses(url, model, tensors, timeout=timeout, request_id=request_id):
        piece = _text(result)
        if piece:
            yield piece


def generate_text(
    url: str,
    prompt: str | bytes,
    *,
    max_tokens: int = 64,
    model: str = "ensemble",
    timeout: float = 120.0,
    request_id: str = "",
    stop_words: Sequence[str] = (),
    bad_words: Sequence[str] = (),
    exclude_input: bool = True,
    **options: Any,
) -> str:
    """The completion as one response. Arguments and errors as in ``stream_text``; the prompt is left out by default."""
    settings = dict(**options, stream=False, exclude_input=exclude_input)
    tensors = _text_tensors(prompt, max_tokens, stop_words, bad_words, settings)
    return "".join(_text(result) for result in responses(url, model, tensors, timeout=timeout, request_id=request_id))


def generate_tokens(
    url: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 64,
    model: str = "tensorrt_llm",
    timeout: float = 120.0,
    request_id: str = "",
    stop_sequences: Sequence[Sequence[int]] = (),
    bad_sequences: Sequence[Sequence[int]] = (),
    stream: bool = False,
    **options: Any,
) -> list[int]:
    """The new token ids after a prompt of token ids (with ``exclude_input=False`` the prompt's too). Errors as in
    ``stream_text``."""
    settings = {"exclude_input": True, **options, "stream": stream}
    tensors = token_tensors(prompt, max_tokens, stop_sequences, bad_sequences, settings)
    tokens: list[int] = []
    for result in responses(url, model, tensors, timeout=timeout, request_id=request_id):
        ids = result.as_numpy("output_ids")
        if ids is not None:
            tokens += ids.reshape(-1).tolist()
    return tokens


def token_tensors(
    prompt: Sequence[int],
    max_tokens: int,
    stop_sequences: Sequence[Sequence[int]],
    bad_sequences: Sequence[Sequence[int]],
    options: dict[str, Any],
) -> dict[str, NDArray[Any]]:
    """The tensors of a request to the tokens model."""
    tensors: dict[str, NDArray[Any]] = {
        "input_ids": _ids("input_ids", [prompt]),
        "input_lengths": np.asarray([[len(prompt)]], np.int32),
        **_option_tensors({**options, "max_tokens": max_tokens}, TOKENS),
    }
    for name, sequences in (("stop_words_list", stop_sequences), ("bad_words_list", bad_sequences)):
        for sequence in sequences:
            _ids(name, [sequence])
        if sequences:
            tensors[name] = sequences_array(sequences)[None]
    return tensors


def _ids(name: str, rows: list[Sequence[int]]) -> NDArray[np.int32]:
    """Token ids as int32 [B, T], none of them changed by it."""
    array = np.asarray([list(row) for row in rows])
    if array.size and (array.dtype.kind not in "iu" or not -(1 << 31) <= array.min() <= array.max() < 1 << 31):
        raise _refused(f"{name}: expected token ids of 32 bits, found {array.dtype} {str(rows[0])[:80]}.")
    return array.astype(np.int32)


def _refused(message: str) -> RequestRefused:
    return RequestRefused(message, "INVALID_ARGUMENT")


def _text_tensors(
    prompt: str | bytes, max_tokens: int, stop: Sequence[str], bad: Sequence[str], options: dict[str, Any]
) -> dict[str, NDArray[Any]]:
    tensors = {
        "text_input": _strings("text_input", [prompt]),
        **_option_tensors({**options, "max_tokens": max_tokens}, TEXT),
    }
    for name, words in (("stop_words", stop), ("bad_words", bad)):
        if words:
            tensors[name] = _strings(name, words)
    return tensors


def _strings(name: str, values: Sequence[str | bytes]) -> NDArray[Any]:
    if isinstance(values, str | bytes):  # its letters, one by one, are not what was meant
        raise _refused(f"{name}: expected a list of texts, found the text {values[:80]!r}.")
    encoded = []
    for value in values:
        if not isinstance(value, str | bytes):
            raise _refused(f"{name}: expected a text, found {type(value).__name__}.")
        try:
            encoded.append(value.encode("utf-8") if isinstance(value, str) else value)
        except UnicodeEncodeError as error:
            raise _refused(f"{name}: expected text that UTF-8 can spell, found {error.reason} at {error.start}.") from error
    return np.asarray([encoded], dtype=np.object_)


def _option_tensors(options: dict[str, Any], interface: str) -> dict[str, NDArray[Any]]:
    rows = rows_of(interface)
    if unknown := sorted(set(options) - set(rows)):
        raise TypeError(f"unknown option {unknown[0]}; known are {', '.join(sorted(rows))}")
    arrays = {}
    for option, value in options.items():
        tensor = rows[option].of(interface)
        if value is None or tensor is None:
            continue
        try:
            arrays[tensor.name] = option_array(rows[option], tensor.name, value)
        except InputError as error:
            raise _refused(str(error)) from error
    return arrays


def _text(result: Any) -> str:
    array = result.as_numpy("text_output")
    return "" if array is None else b"".join(array.reshape(-1).tolist()).decode("utf-8", "replace")


def responses(
    url: str, model: str, tensors: dict[str, NDArray[Any]], *, timeout: float = 120.0, request_id: str = ""
) -> Iterator[Any]:
    """All responses to one request, as ``tritonclient.grpc.InferResult``; the empty last one is left out.

    The stream is closed before this returns, and cancelled when it is left early: an open one would keep the server from
    stopping. Raises as ``stream_text``.
    """
    check_url(url)
    if not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise _refused(f"timeout: expected seconds above 0, found {timeout!r:.40}.")
    grpcclient = _tritonclient()
    by_tokens = "input_ids" in tensors
    request_id = request_id or (uuid.uuid4().hex if by_tokens else "")
    with _stream(grpcclient, url) as (client, answers):
        # A stream that has broken by now refuses the request in words of its own; why it broke is among the answers.
        with contextlib.suppress(grpcclient.InferenceServerException):
            inputs = _infer_inputs(grpcclient, tensors)
            client.async_stream_infer(model, inputs, request_id=request_id, enable_empty_final_response=True)
        finished = False
        try:
            yield from _until_final(url, model, answers, timeout)
            finished = True
        finally:
            if by_tokens and not finished:
                _stop(grpcclient, client, model, request_id, answers)


def _stop(grpcclient: Any, client: Any, model: str, request_id: str, answers: queue.Queue[tuple[Any, Any]]) -> None:
    """End a request by its id, and wait a moment for it: a tokens model may be a Triton ensemble, through which a cancellation
    does not pass."""
    tensors = {"input_ids": [[0]], "input_lengths": [[1]], "request_output_len": [[1]]}
    stop = {name: np.asarray(value, np.int32) for name, value in tensors.items()} | {"stop": np.asarray([[True]])}
    with contextlib.suppress(grpcclient.InferenceServerException, ServerError):
        client.async_stream_infer(model, _infer_inputs(grpcclient, stop), request_id=request_id, enable_empty_final_response=True)
        for _ in range(2):  # of the one and of the other
            collections.deque(_until_final("", model, answers, _STOP_SECONDS), maxlen=0)


def _infer_inputs(grpcclient: Any, tensors: dict[str, NDArray[Any]]) -> list[Any]:
    inputs = []
    for name, array in tensors.items():
        tensor = grpcclient.InferInput(name, list(array.shape), _TRITON_NAMES[array.dtype.name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _until_final(url: str, model: str, answers: queue.Queue[tuple[Any, Any]], timeout: float) -> Iterator[Any]:
    deadline = time.monotonic() + timeout
    while True:
        try:
            result, error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise ServerError(
                f"no answer from {model} at {url}",
                expected=f"a response within {timeout:g} s",
                found="none",
                remedy="wait longer (timeout), or see the server's log",
            ) from None
        if error is not None:
            raise _failure(url, error)
        deadline = time.monotonic() + timeout
        response = result.get_response()
        if response.outputs:
            yield result
        if response.parameters["triton_final_response"].bool_param:
            return


def check_url(url: str) -> None:
    """Raise ServerError unless the text is ``host:port``."""
    if _is_address(url):
        return
    bare = re.sub(r"^[a-z]+://|/.*$", "", str(url)[:200])
    raise ServerError(
        "the server's address",
        expected="host:port, such as 127.0.0.1:8001",
        found=repr(url)[:200],
        remedy=f"write {bare}, without more" if _is_address(bare) else "give the gRPC endpoint that `ngpt-deploy serve` prints",
    )


def _is_address(url: object) -> bool:
    found = _URL.fullmatch(url) if isinstance(url, str) else None
    return found is not None and 1 <= int(found["port"]) <= 65535


def _failure(url: str, error: Any) -> ServerError:
    """What an error of a stream means: no server there, or a request that the server refused."""
    status = str(error.status() or "").removeprefix("StatusCode.")
    if status not in _DEAD:
        return RequestRefused(error.message(), status)
    return ServerError(
        f"no Triton server answers gRPC at {url}",
        found=error.message()[:300],
        remedy="start one with `ngpt-deploy serve`, and give the gRPC port (8001 unless chosen otherwise), not the HTTP one",
    )


@contextmanager
def _stream(grpcclient: Any, url: str) -> Iterator[tuple[Any, queue.Queue[tuple[Any, Any]]]]:
    client = grpcclient.InferenceServerClient(url)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    finished = False
    try:
        # Not with the header triton_grpc_error, which would add the gRPC status to a refusal: tritonserver 2.51 dies of
        # SIGSEGV within a few refusals of that kind, and takes everybody else's requests with it.
        client.start_stream(lambda result, error: answers.put((result, error)))
        yield client, answers
        finished = True
    finally:
        client.stop_stream(cancel_requests=not finished)
        client.close()


def _tritonclient() -> Any:
    try:
        return importlib.import_module("tritonclient.grpc")
    except (ImportError, RuntimeError) as error:  # it says the second where grpc or protobuf is missing
        raise missing_package("the Triton client is not installed", "serve", found=str(error)) from error
