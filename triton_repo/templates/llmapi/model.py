"""Text in, text out with the PyTorch runtime of TensorRT-LLM, which batches, samples and tokenises by itself.

Contract-tested with a double of `tensorrt_llm.LLM`; not executed with TensorRT-LLM. The interface, and that a streamed response holds the whole
text so far, are those of the llmapi model in TensorRT-LLM's repository (read at commit 044a90d2).
"""

import importlib.util
import json
import sys
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from serving_inputs import InputError, scalar, text_of, words_of  # noqa: E402
from serving_triton import FINAL, Watcher, bad_request, error_response, inputs_of  # noqa: E402

SAMPLING = ("best_of", "top_k", "max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed")
SAMPLING += ("exclude_input_from_output",)
EXTRAS = ("finish_reason", "stop_reason")


class TritonPythonModel:
    """See the Python backend's documentation for the three methods."""

    def initialize(self, args):
        # The file is JSON, which YAML contains: no YAML library is needed to read it.
        settings = json.loads((HERE / "model.yaml").read_text(encoding="utf-8"))
        settings.pop("triton_config")
        for path in sorted((HERE / "modules").glob("*.py")):
            _import(path)  # registers the model's class
        import tensorrt_llm  # not before: it opens the GPUs

        self.params = tensorrt_llm.SamplingParams
        self.llm = tensorrt_llm.LLM(**settings | {"model": str(HERE / settings["model"])})
        self.live = {}
        self.lock = threading.Lock()
        self.watcher = Watcher()

    def finalize(self):
        self.watcher.stop()
        self.llm.shutdown()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except (InputError, ValueError) as error:
                sender.send(error_response(bad_request(error)), flags=FINAL)
            except Exception as error:
                pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
                sender.send(error_response(pb_utils.TritonError(f"{type(error).__name__}: {error}")), flags=FINAL)

    def _accept(self, request, sender):
        inputs, name = inputs_of(request), request.request_id()
        if scalar(inputs, "stop"):
            self._stop(name)
            sender.send(flags=FINAL)
            return
        prompt = text_of(inputs, "text_input")
        given = {key: value for key in SAMPLING if (value := scalar(inputs, f"sampling_param_{key}")) is not None}
        if given.get("max_tokens", 1) < 1:
            raise InputError(f"sampling_param_max_tokens: expected at least 1, found {given['max_tokens']}.")
        if stop := words_of(inputs, "sampling_param_stop"):
            given["stop"] = stop
        wanted = [key for key in EXTRAS if scalar(inputs, f"return_{key}")]
        probability = bool(scalar(inputs, "return_cumulative_logprob"))
        streaming = bool(scalar(inputs, "streaming"))
        if probability:
            given["logprobs"] = 1  # without it nothing is summed up
        result = self.llm.generate_async(prompt, self.params(**given), streaming=streaming)
        with self.lock:
            self.live.setdefault(name, []).append(result)
        key = self.watcher.watch(sender, result.abort)
        threading.Thread(target=self._answer, args=(sender, result, key, name, wanted, probability), daemon=True).start()

    def _stop(self, name):
        if not name:
            raise InputError("stop: expected the id of the request to stop, found a request without an id.")
        with self.lock:
            results = list(self.live.get(name, ()))
        for result in results:
            result.abort()

    def _answer(self, sender, result, key, name, wanted, probability):
        held = failure = None
        try:
            # One response is held back, so that the last can carry the final flag.
            for output in result:
                if held is not None:
                    sender.send(held)
                held = _response(output.outputs, wanted, probability)
        except Exception as error:
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            failure = pb_utils.TritonError(f"{type(error).__name__}: {error}")
        with self.lock:
            rest = [other for other in self.live.get(name, ()) if other is not result]
            self.live[name] = rest
            if not rest:
                del self.live[name]
        self.watcher.forget(key)
        last = held if failure is None else error_response(failure)
        if last is None:
            sender.send(flags=FINAL)
        else:
            sender.send(last, flags=FINAL)


def _response(sequences, wanted, probability):
    texts = np.asarray([sequence.text.encode("utf-8") for sequence in sequences], dtype=np.object_)
    tensors = [pb_utils.Tensor("text_output", texts)]
    for name in wanted:
        values = [str(getattr(sequence, name)).encode("utf-8") for sequence in sequences]
        tensors.append(pb_utils.Tensor(name, np.asarray(values, dtype=np.object_)))
    if probability:
        sums = np.asarray([sequence.cumulative_logprob for sequence in sequences], np.float32)
        tensors.append(pb_utils.Tensor("cumulative_logprob", sums))
    return pb_utils.InferenceResponse(output_tensors=tensors)


def _import(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
