"""A small gRPC client of the packaged models; works with any server that offers the same interface."""

from __future__ import annotations

import importlib
import queue
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ngpt.errors import MissingPackageError, ServerError
from triton_repo.serving_inputs import OPTION_DTYPES, TEXT_NAMES, TOKENS_NAMES, sequences_array

_TRITON_NAMES = {"int32": "INT32", "float32": "FP32", "uint64": "UINT64", "bool": "BOOL", "object": "BYTES"}


class RequestRefused(ServerError):
    """The server answered with an error. ``status`` is the gRPC status, empty where a stream reports the text alone."""

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
        url: ``host:port`` of the gRPC endpoint.
        prompt: text (bytes are sent as they are).
        timeout: seconds that may pass between two responses.
        options: temperature, top_k, top_p, seed, min_tokens, repetition_penalty, ... as in ``serving_inputs.TEXT_NAMES``.

    Raises:
        RequestRefused: the server refused or failed the request.
        ServerError: no answer in time. MissingPackageError: tritonclient is not installed.
    """
    tensors = _text_tensors(prompt, max_tokens, stop_words, bad_words, {**options, "stream": True})
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
    settings = {**options, "stream": False, "exclude_input": exclude_input}
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
    """The new token ids after a prompt of token ids. Errors as in ``stream_text``."""
    settings = {**options, "stream": stream, "exclude_input": True}
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
        "input_ids": np.asarray([list(prompt)], np.int32),
        "input_lengths": np.asarray([[len(prompt)]], np.int32),
        **_option_tensors({**options, "max_tokens": max_tokens}, TOKENS_NAMES),
    }
    for name, sequences in (("stop_words_list", stop_sequences), ("bad_words_list", bad_sequences)):
        if sequences:
            tensors[name] = sequences_array(sequences)[None]
    return tensors


def _text_tensors(
    prompt: str | bytes, max_tokens: int, stop: Sequence[str], bad: Sequence[str], options: dict[str, Any]
) -> dict[str, NDArray[Any]]:
    tensors = {"text_input": _strings([prompt]), **_option_tensors({**options, "max_tokens": max_tokens}, TEXT_NAMES)}
    for name, words in (("stop_words", stop), ("bad_words", bad)):
        if words:
            tensors[name] = _strings(words)
    return tensors


def _strings(values: Sequence[str | bytes]) -> NDArray[Any]:
    encoded = [value.encode("utf-8") if isinstance(value, str) else value for value in values]
    return np.asarray([encoded], dtype=np.object_)


def _option_tensors(options: dict[str, Any], names: dict[str, str]) -> dict[str, NDArray[Any]]:
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise TypeError(f"unknown option {unknown[0]}; known are {', '.join(sorted(names))}")
    given = {option: value for option, value in options.items() if value is not None}
    return {names[option]: np.asarray([[value]], OPTION_DTYPES[option]) for option, value in given.items()}


def _text(result: Any) -> str:
    array = result.as_numpy("text_output")
    return "" if array is None else b"".join(array.reshape(-1).tolist()).decode("utf-8")


def responses(
    url: str, model: str, tensors: dict[str, NDArray[Any]], *, timeout: float = 120.0, request_id: str = ""
) -> Iterator[Any]:
    """All responses to one request, as ``tritonclient.grpc.InferResult``; the empty last one is left out.

    The stream is closed before this returns, and cancelled when it is left early: an open one would keep the server from
    stopping. Raises as ``stream_text``.
    """
    grpcclient = _tritonclient()
    inputs = []
    for name, array in tensors.items():
        tensor = grpcclient.InferInput(name, list(array.shape), _TRITON_NAMES[array.dtype.name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    with _stream(grpcclient, url) as (client, answers):
        client.async_stream_infer(model, inputs, request_id=request_id, enable_empty_final_response=True)
        deadline = time.monotonic() + timeout
        while True:
            try:
                result, error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise ServerError(
                    f"no answer from {model} at {url}", expected=f"a response within {timeout:g} s", found="none"
                ) from None
            if error is not None:
                raise RequestRefused(error.message(), _status(error))
            deadline = time.monotonic() + timeout
            response = result.get_response()
            if response.outputs:
                yield result
            if response.parameters["triton_final_response"].bool_param:
                return


def _status(error: Any) -> str:
    return str(error.status() or "").removeprefix("StatusCode.")


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
    except ImportError as error:
        raise MissingPackageError(
            "the Triton client is not installed",
            expected="tritonclient[grpc]",
            found=str(error),
            remedy='Run: pip install "ngpt-deploy[serve]".',
        ) from error
