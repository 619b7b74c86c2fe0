"""How the text model reaches a tokens model of another backend: model-to-model calls of the Python backend, one a request.

Packaged under the name engine_link.py where the tokens model is TensorRT-LLM's own backend, in place of the link to this project's engine and
with its interface. Contract-tested with the pip server against this project's tokens model, which has the same tensors;
not executed on backend "tensorrtllm". Several calls at once in one process hang the Python backend of tritonserver 2.51, so the model that uses this
takes its requests in turn (`in_turn`) and has several instances instead.
"""

import time
import uuid

import numpy as np
import triton_python_backend_utils as pb_utils
from serving_inputs import OPTION_DTYPES, TOKENS_NAMES, sequences_array

# What SamplingParams calls an option, and what the tensors' table does.
OPTIONS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "logprobs": "return_log_probs",
    **{
        name: name
        for name in (
            "temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
            "return_context_logits", "return_generation_logits",
        )
    },
}  # fmt: skip
MOMENTS = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
OUTPUTS = ("output_ids", "sequence_length")
AGAIN_SECONDS = 0.5


def address(model_folder):
    """The tokens model's name."""
    return "tensorrt_llm"


class EngineLink:
    """One request to the tokens model. Iterating yields (header, arrays); the last header has "end" or "error"."""

    def __init__(self, name, prompt, sampling):
        self._name = name
        self._id = uuid.uuid4().hex  # a stop names the request to stop
        self._stopped_at = None
        wanted = [*OUTPUTS, *MOMENTS]
        for option, output in (("logprobs", "output_log_probs"), ("return_context_logits", "context_logits")):
            wanted += [output] if sampling.get(option) else []
        wanted += ["generation_logits"] if sampling.get("return_generation_logits") else []
        self._request = self._call(wanted, _tensors(prompt, sampling))

    def cancel(self):
        """Give the request up. May be called again: a stop that overtakes its request is lost, so it is repeated."""
        now = time.monotonic()
        if self._stopped_at is not None and now < self._stopped_at + AGAIN_SECONDS:
            return
        self._stopped_at = now
        tensors = {"input_ids": [[0]], "input_lengths": [[1]], "request_output_len": [[1]]}
        arrays = {name: np.asarray(value, np.int32) for name, value in tensors.items()} | {"stop": np.asarray([[True]])}
        for _ in self._call(OUTPUTS, arrays).exec(decoupled=True):
            pass

    def __iter__(self):
        times, context = {}, []
        for response in self._request.exec(decoupled=True):
            if response.has_error():
                yield _refusal(response.error()), []
                return
            found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            times |= {name: int(found[name].reshape(-1)[0]) for name in MOMENTS if name in found}
            if "context_logits" in found:
                context = [found["context_logits"].reshape(-1, found["context_logits"].shape[-1])]
            yield from _tokens(found)
        yield {"end": "", "times": times}, context

    def _call(self, outputs, arrays):
        return pb_utils.InferenceRequest(
            model_name=self._name,
            request_id=self._id,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
        )


def _tensors(prompt, sampling):
    arrays = {"input_ids": np.asarray([prompt], np.int32), "input_lengths": np.asarray([[len(prompt)]], np.int32)}
    given = {option: sampling[key] for key, option in OPTIONS.items() if key in sampling}
    given |= {"stream": True, "exclude_input": True, "return_perf_metrics": True}
    ends = [-1] if sampling.get("ignore_eos") else list(sampling["eos_token_ids"]) or [-1]
    given["end_id"] = ends[0]
    arrays |= {TOKENS_NAMES[option]: np.asarray([[value]], OPTION_DTYPES[option]) for option, value in given.items()}
    if ends[1:]:  # there is room for one end token; a further one is a stop word of one token
        arrays["stop_words_list"] = sequences_array([[token] for token in ends[1:]])[None]
    if sampling.get("bad_sequences"):
        arrays["bad_words_list"] = sequences_array(sampling["bad_sequences"])[None]
    return arrays


def _tokens(found):
    """The new tokens of one response. Rows of probabilities may cover everything so far: the new ones are the last."""
    count = int(found["sequence_length"].reshape(-1)[0]) if "sequence_length" in found else 0
    tokens = found["output_ids"].reshape(-1)[:count].tolist() if count and "output_ids" in found else []
    logprobs = found["output_log_probs"].reshape(-1).tolist() if "output_log_probs" in found else []
    logits = found.get("generation_logits")
    for place, token in enumerate(tokens):
        behind = place - len(tokens)
        header = {"token": token, "logprob": logprobs[behind] if logprobs else None, "last": False}
        yield header, [] if logits is None else [logits.reshape(-1, logits.shape[-1])[behind]]


def _refusal(error):
    kinds = {pb_utils.TritonError.INVALID_ARG: "RequestError", pb_utils.TritonError.UNAVAILABLE: "CapacityError"}
    return {"error": error.message(), "kind": kinds.get(error.code(), "")}
