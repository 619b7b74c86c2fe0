"""A tokens model of a running Triton server as the parity check asks it (`engines.parity.wire.Server`).

This project's own model and TensorRT-LLM's backend take the same tensors; what one of them does not offer (TensorRT-LLM gives
logits only of engines that were built to), it refuses or leaves out, and the check goes on without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.parity.wire import CONTEXT, GENERATION, PROBABILITIES, Answer
from ngpt.errors import ServerError, missing_package
from triton_repo.client import RequestRefused, check_url, responses, token_tensors

MODEL = "tensorrt_llm"
_ASKED = {
    CONTEXT: ("return_context_logits", "context_logits"),
    GENERATION: ("return_generation_logits", "generation_logits"),
    PROBABILITIES: ("return_log_probs", "output_log_probs"),
}
_DRAWN = {"temperature": 1.0, "top_k": 40}
"""How answers are drawn: TensorRT-LLM draws nothing without a number of tokens to draw from."""


class ServedModel:
    """A model that takes token ids, at ``host:port`` of a server's gRPC endpoint.

    Raises ServerError where no server answers or it has no such model, MissingPackageError without tritonclient.
    """

    def __init__(self, url: str, model: str = MODEL, *, timeout: float = 120.0) -> None:
        check_url(url)
        self.url, self.model, self.timeout = url, model, timeout

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """The server, the model, its versions and its platform, in the server's own words."""
        try:
            from tritonclient.grpc import InferenceServerClient
            from tritonclient.utils import InferenceServerException
        except (ImportError, RuntimeError) as error:
            raise missing_package("the Triton client is not installed", "serve", found=str(error)) from error
        client = InferenceServerClient(self.url)
        try:
            server = client.get_server_metadata(client_timeout=self.timeout)
            about = client.get_model_metadata(self.model, client_timeout=self.timeout)
        except InferenceServerException as error:
            raise ServerError(
                f"the server at {self.url} does not describe the model {self.model}",
                found=str(error.message())[:300],
                remedy="see whether it serves it; --model-name says which is meant",
            ) from error
        finally:
            client.close()
        found = {
            "url": self.url,
            "model": self.model,
            "version": ", ".join(about.versions),
            "platform": about.platform,
            "server": f"{server.name} {server.version}",
        }
        return {name: value[:200] for name, value in found.items()}

    @cached_property
    def offered(self) -> frozenset[str]:
        """Found out by asking for one token with each."""
        self.ask([0], 1, frozenset())  # a server that answers nothing at all is an error, not one that offers little
        return frozenset(name for name in _ASKED if self._offers(name))

    def _offers(self, name: str) -> bool:
        try:
            answer = self.ask([0], 1, frozenset({name}))
        except RequestRefused:
            return False
        given = {CONTEXT: answer.context, GENERATION: answer.generation, PROBABILITIES: answer.log_probs}[name]
        return given is not None and given.size > 0

    def ask(self, prompt: Sequence[int], tokens: int, wanted: frozenset[str], *, seed: int | None = None) -> Answer:
        """So many new tokens after a prompt, in one response. Raises as `triton_repo.client.generate_tokens`."""
        options: dict[str, Any] = {"exclude_input": True, "stream": False, "end_id": -1}
        options |= {_ASKED[name][0]: True for name in wanted}
        if seed is not None:
            options |= {**_DRAWN, "seed": seed}
        tensors = token_tensors(prompt, tokens, (), (), options)
        found: dict[str, list[NDArray[Any]]] = {}
        for response in responses(self.url, self.model, tensors, timeout=self.timeout):
            for name in ("output_ids", *(output for _, output in _ASKED.values())):
                if (array := response.as_numpy(name)) is not None:
                    found.setdefault(name, []).append(array)
        if "output_ids" not in found:
            raise ServerError(f"the answer of {self.model} at {self.url}", expected="output_ids", found="none")
        joined = {name: np.concatenate([_rows(name, array) for array in arrays]) for name, arrays in found.items()}
        context, generation, probabilities = (
            joined.get(output) if name in wanted else None for name, (_, output) in _ASKED.items()
        )
        return Answer(tuple(map(int, joined["output_ids"])), context, generation, probabilities)


def _rows(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Without the axes of batch and beam: logits [n, V], the others [n]."""
    if name.endswith("_logits"):
        return np.asarray(array, np.float32).reshape(-1, array.shape[-1])
    return array.reshape(-1)
