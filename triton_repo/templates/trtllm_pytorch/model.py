"""Text in, text out with the PyTorch runtime of TensorRT-LLM, which batches, samples and tokenises by itself.

Contract-tested with a double of `tensorrt_llm.LLM`; not executed with TensorRT-LLM. The interface, and that a streamed
response holds the whole text so far, are those of the llmapi model in TensorRT-LLM's repository (read at commit 044a90d2).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # what was copied beside this file, before anything that is installed

from triton_repo.copies import check_copies
from triton_repo.interface import PYTORCH
from triton_repo.interface import inputs as rows_of
from triton_repo.serving_inputs import InputError, check_range, scalar, text_of, words_of
from triton_repo.templates.shared.python_backend import (
    FINAL,
    InFlight,
    Sender,
    Watcher,
    bad_request,
    error_response,
    failed,
    inputs_of,
)

PREFIX = "sampling_param_"
SAMPLING = [(row, tensor) for row, tensor in rows_of(PYTORCH) if tensor.name.startswith(PREFIX) and tensor.dims == (1,)]
"""Inputs that are arguments of `tensorrt_llm.SamplingParams`, under the name behind the prefix."""
EXTRAS = ("finish_reason", "stop_reason")


class TritonPythonModel:
    """See the Python backend's documentation for the three methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        check_copies(HERE, json.loads(args["model_config"]))
        # The file is JSON, which YAML contains: no YAML library is needed to read it.
        settings = json.loads((HERE / "model.yaml").read_text(encoding="utf-8"))
        settings.pop("triton_config")
        for path in sorted((HERE / "modules").glob("*.py")):
            _import(path)  # registers the model's class
        import tensorrt_llm  # not before: it opens the GPUs

        self.params = tensorrt_llm.SamplingParams
        self.llm = tensorrt_llm.LLM(**settings | {"model": str(HERE / settings["model"])})
        self.results: InFlight[Any] = InFlight()
        self.watcher = Watcher()

    def finalize(self) -> None:
        self.watcher.stop()
        self.llm.shutdown()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except (InputError, ValueError) as error:
                sender.send(error_response(bad_request(error)), flags=FINAL)
            except Exception as error:
                sender.send(error_response(failed(error)), flags=FINAL)

    def _accept(self, request: Any, sender: Sender) -> None:
        inputs, name = inputs_of(request), request.request_id()
        if scalar(inputs, "stop"):
            for running in self.results.named(name):
                running.abort()
            sender.send(flags=FINAL)
            return
        prompt = text_of(inputs, "text_input")
        given: dict[str, Any] = {}
        for row, tensor in SAMPLING:
            if (value := scalar(inputs, tensor.name)) is not None:
                check_range(row, tensor.name, value)
                given[tensor.name.removeprefix(PREFIX)] = value
        if stop := words_of(inputs, "sampling_param_stop"):
            given["stop"] = stop
        wanted = [key for key in EXTRAS if scalar(inputs, f"return_{key}")]
        probability = bool(scalar(inputs, "return_cumulative_logprob"))
        streaming = bool(scalar(inputs, "streaming"))
        if probability:
            given["logprobs"] = 1  # without it nothing is summed up
        result = self.llm.generate_async(prompt, self.params(**given), streaming=streaming)
        self.results.add(name, result)
        key = self.watcher.watch(sender, result.abort)
        threading.Thread(target=self._answer, args=(sender, result, key, name, wanted, probability), daemon=True).start()

    def _answer(self, sender: Sender, result: Any, key: object, name: str, wanted: Sequence[str], probability: bool) -> None:
        held = failure = None
        try:
            # One response is held back, so that the last can carry the final flag.
            for output in result:
                if held is not None:
                    sender.send(held)
                held = _response(output.outputs, wanted, probability)
        except Exception as error:
            failure = failed(error)
        self.results.remove(name, result)
        self.watcher.forget(key)
        last = held if failure is None else error_response(failure)
        if last is None:
            sender.send(flags=FINAL)
        else:
            sender.send(last, flags=FINAL)


def _response(sequences: Sequence[Any], wanted: Sequence[str], probability: bool) -> Any:
    texts = np.asarray([sequence.text.encode("utf-8") for sequence in sequences], dtype=np.object_)
    tensors = [pb_utils.Tensor("text_output", texts)]
    for name in wanted:
        values = [str(getattr(sequence, name)).encode("utf-8") for sequence in sequences]
        tensors.append(pb_utils.Tensor(name, np.asarray(values, dtype=np.object_)))
    if probability:
        sums = np.asarray([sequence.cumulative_logprob for sequence in sequences], np.float32)
        tensors.append(pb_utils.Tensor("cumulative_logprob", sums))
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _import(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
