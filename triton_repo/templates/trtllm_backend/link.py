"""How the text model reaches a tokens model of another backend: model-to-model calls of the Python backend, one a request.

A request that asks for what that backend has no input for does not come so far: `parse_options` refuses it by name.
Contract-tested with the pip server against this project's own model, which has the same tensors; not executed on backend
"tensorrtllm".
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from engines.runtime.events import Times, TokenEvent
from triton_repo.interface import BACKEND, INPUTS, TENSORRT_LLM, WORD_LIST
from triton_repo.serving_inputs import NUMPY, sequences_array

SETS = {row.sets: row for row in INPUTS if row.sets}
"""Rows by what they set; all that is set is sent, or refused."""
BY_OPTION = {row.option: row for row in INPUTS}
MOMENTS = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
OUTPUTS = ("output_ids", "sequence_length")
AGAIN_SECONDS = 0.5


class Refusal(Exception):
    """What the backend refused or failed: `error`, as a TritonError for the client."""

    def __init__(self, error: Any) -> None:
        self.error = error


class EngineLink:
    """One request to the tokens model. Iterating yields its tokens, and raises Refusal; then `times` and `context_logits`,
    float32 [T, V], are there if the backend gave them."""

    def __init__(self, name: str, prompt: Sequence[int], sampling: dict[str, Any]) -> None:
        self._name = name
        self._id = uuid.uuid4().hex  # a stop names the request to stop
        self.times: Times | None = None
        self.context_logits: NDArray[np.float32] | None = None
        self._count = 0
        self._stopped_at: float | None = None
        wanted = [*OUTPUTS, *MOMENTS]
        for option, output in (("logprobs", "output_log_probs"), ("return_context_logits", "context_logits")):
            wanted += [output] if sampling.get(option) else []
        wanted += ["generation_logits"] if sampling.get("return_generation_logits") else []
        self._request = self._call(wanted, _tensors(prompt, sampling))

    def cancel(self) -> None:
        """Give the request up. May be called again: a stop that overtakes its request is lost, so it is repeated."""
        now = time.monotonic()
        if self._stopped_at is not None and now < self._stopped_at + AGAIN_SECONDS:
            return
        self._stopped_at = now
        tensors = {"input_ids": [[0]], "input_lengths": [[1]], "request_output_len": [[1]]}
        arrays = {name: np.asarray(value, np.int32) for name, value in tensors.items()} | {"stop": np.asarray([[True]])}
        for _ in self._call(OUTPUTS, arrays).exec(decoupled=True):
            pass

    def __iter__(self) -> Iterator[TokenEvent]:
        times: dict[str, int] = {}
        for response in self._request.exec(decoupled=True):
            if response.has_error():
                raise Refusal(response.error())
            found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            times |= {name.removesuffix("_time_ns") + "_ns": int(found[name].reshape(-1)[0]) for name in MOMENTS if name in found}
            if "context_logits" in found:
                self.context_logits = found["context_logits"].reshape(-1, found["context_logits"].shape[-1])
            for event in _tokens(found, self._count):
                self._count += 1
                yield event
        self.times = Times(**times) if "arrival_ns" in times else None

    def _call(self, outputs: Sequence[str], arrays: dict[str, NDArray[Any]]) -> Any:
        return pb_utils.InferenceRequest(
            model_name=self._name,
            request_id=self._id,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
        )


def _tensors(prompt: Sequence[int], sampling: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """The backend's inputs for options of SamplingParams. Raises ValueError, by name, for one that it has no input for."""
    arrays: dict[str, NDArray[Any]] = {
        "input_ids": np.asarray([prompt], np.int32),
        "input_lengths": np.asarray([[len(prompt)]], np.int32),
    }
    given: dict[str, Any] = {"stream": True, "exclude_input": True, "return_perf_metrics": True}
    lists: dict[str, list[Sequence[int]]] = {}
    ends, rest = [-1], dict(sampling)
    if not rest.pop("ignore_eos", False):
        ends = list(rest.pop("eos_token_ids", ())) or ends
    rest.pop("eos_token_ids", None)
    given["end_id"] = ends[0]
    for name, value in rest.items():
        row = SETS.get(name)
        if row is None or (tensor := row.of(BACKEND)) is None:
            raise ValueError(f"{name}: {TENSORRT_LLM} has no such input.")
        if tensor.dims == WORD_LIST:
            lists[tensor.name] = list(value)
        else:
            given[row.option] = value
    for option, value in given.items():
        tensor = BY_OPTION[option].of(BACKEND)
        assert tensor is not None
        arrays[tensor.name] = np.asarray([[value]], NUMPY[tensor.dtype])
    # There is room for one end token. A further one is a stop word of one token.
    lists.setdefault("stop_words_list", []).extend([token] for token in ends[1:])
    return arrays | {name: sequences_array(sequences)[None] for name, sequences in lists.items() if sequences}


def _tokens(found: dict[str, NDArray[Any]], index: int) -> Iterator[TokenEvent]:
    """The new tokens of one response. Rows of probabilities may cover everything so far: the new ones are the last."""
    count = int(found["sequence_length"].reshape(-1)[0]) if "sequence_length" in found else 0
    tokens = found["output_ids"].reshape(-1)[:count].tolist() if count and "output_ids" in found else []
    logprobs = found["output_log_probs"].reshape(-1).tolist() if "output_log_probs" in found else []
    logits = found.get("generation_logits")
    for place, token in enumerate(tokens):
        behind = place - len(tokens)
        row = None if logits is None else logits.reshape(-1, logits.shape[-1])[behind]
        yield TokenEvent(token, index + place, logprobs[behind] if logprobs else None, logits=row)
