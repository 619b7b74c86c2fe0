"""TEST DOUBLE of the module `tensorrt_llm` that a packaged model imports: `LLM` and `SamplingParams`, as far as used.

Generates with this project's ONNX engine ($NGPT_DOUBLE_ENGINE, code from $NGPT_DOUBLE_ROOT), so the tokens are real;
says nothing about TensorRT-LLM itself. Keyword arguments that the real classes lack are refused.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.environ["NGPT_DOUBLE_ROOT"])

from engines import load_engine


@dataclass
class SamplingParams:
    best_of: int = 1
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int = 32
    temperature: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: list | None = None
    logprobs: int | None = None
    exclude_input_from_output: bool = True

    def __post_init__(self):
        if self.best_of != 1:
            raise ValueError(f"best_of: expected 1, found {self.best_of}")


@dataclass
class Completion:
    text: str
    finish_reason: str | None
    stop_reason: str | None
    cumulative_logprob: float


@dataclass
class Output:
    outputs: list


class Result:
    """Iterates as GenerationResult does: after each token when streaming, else once."""

    def __init__(self, engine, handle, streaming):
        self._engine, self._handle, self._streaming = engine, handle, streaming

    def abort(self):
        self._handle.cancel()

    def __iter__(self):
        tokens, total = [], 0.0
        for event in self._handle:
            if event.has_token:
                tokens.append(event.token)
                total += event.logprob or 0.0
            if self._streaming or event.finish_reason:
                yield Output([Completion(self._engine.tokenizer.decode(tokens), event.finish_reason, None, total)])


class LLM:
    def __init__(self, model, backend, tensor_parallel_size, max_batch_size, kv_cache_config):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in Path(model).iterdir()}
        assert backend == "pytorch" and tensor_parallel_size == 1 and set(kv_cache_config) == {"free_gpu_memory_fraction"}
        self._engine = load_engine(os.environ["NGPT_DOUBLE_ENGINE"], num_slots=max_batch_size, threads=1)

    def generate_async(self, inputs, sampling_params, streaming=False):
        options = {"temperature": sampling_params.temperature, "seed": sampling_params.seed, "top_k": sampling_params.top_k}
        given = {key: value for key, value in options.items() if value is not None}
        prompt = self._engine.tokenizer.encode(inputs)
        handle = self._engine.submit(prompt, sampling_params.max_tokens, logprobs=bool(sampling_params.logprobs), **given)
        return Result(self._engine, handle, streaming)

    def shutdown(self):
        self._engine.close()
