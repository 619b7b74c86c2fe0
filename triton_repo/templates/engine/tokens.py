"""Tokens in, tokens out: the engine behind a scheduler that batches continuously."""

from __future__ import annotations

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

from engines.runtime import RequestHandle, SamplingParams, TokenEvent, load_engine
from engines.runtime.errors import CapacityError, RequestError
from triton_repo.interface import TOKENS
from triton_repo.serving_inputs import (
    InputError,
    Options,
    check_room,
    parse_options,
    prompt_tokens,
    scalar,
    word_lists,
)
from triton_repo.templates.engine.link import EngineServer, address
from triton_repo.templates.shared.python_backend import (
    FINAL,
    InFlight,
    Metrics,
    Sender,
    Watcher,
    bad_request,
    error_response,
    failed,
    inputs_of,
    parameter,
    tensor,
)

METRICS = {
    "ngpt_requests_active": ("active", "gauge", "Requests that hold a slot"),
    "ngpt_requests_queued": ("queued", "gauge", "Requests that wait for a slot"),
    "ngpt_slots": ("slots", "gauge", "Slots of the key-value cache"),
    "ngpt_prompt_tokens": ("prompt_tokens_total", "counter", "Prompt tokens read"),
    "ngpt_generated_tokens": ("generated_tokens_total", "counter", "Tokens generated"),
    "ngpt_requests_completed": ("completed_total", "counter", "Requests answered to their end"),
    "ngpt_requests_cancelled": ("cancelled_total", "counter", "Requests cancelled"),
}


class TritonPythonModel:
    """See the Python backend's documentation for the three methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        threads = parameter(config, "threads")
        self.engine = load_engine(
            HERE / "engine",
            num_slots=int(parameter(config, "num_slots", "8")),
            threads=int(threads) if threads else None,
            prefill_chunk=int(parameter(config, "prefill_chunk", "256")),
            max_queue=int(parameter(config, "max_queue", "256")),
        )
        self.engine.scheduler.start()
        self.exclude_input = parameter(config, "exclude_input_in_output", "false") == "true"
        self.vocab_size = self.engine.manifest.model.vocab_size
        self.max_length = self.engine.manifest.model.max_length
        self.answers: InFlight[Answer] = InFlight()
        self.metrics = Metrics(args["model_name"], METRICS)
        self.link = EngineServer(address(HERE.parent), self._submit, self.metrics.first_token)
        self.watcher = Watcher(lambda: self.metrics.update(self.engine.scheduler.stats))

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except (InputError, RequestError) as error:
                sender.send(error_response(bad_request(error)), flags=FINAL)
            except CapacityError as error:
                full = pb_utils.TritonError(str(error), pb_utils.TritonError.UNAVAILABLE)
                sender.send(error_response(full), flags=FINAL)
            except Exception as error:
                sender.send(error_response(failed(error)), flags=FINAL)

    def finalize(self) -> None:
        self.link.stop()
        self.watcher.stop()
        self.engine.close()

    def _accept(self, request: Any, sender: Sender) -> None:
        inputs = inputs_of(request)
        name = request.request_id()
        if scalar(inputs, "stop"):
            for answer in self.answers.named(name):
                answer.give_up()
            sender.send(flags=FINAL)
            return
        options = parse_options(inputs, TOKENS, self.vocab_size)
        prompt = prompt_tokens(inputs, self.vocab_size)
        check_room("input_ids", len(prompt), "request_output_len", options.given["max_tokens"], self.max_length)
        handle = self._submit(prompt, options.sampling | word_lists(inputs, self.vocab_size))
        answer = Answer(sender, options, prompt, options.wants("exclude_input", self.exclude_input), handle)
        self.answers.add(name, answer)
        key = self.watcher.watch(sender, answer.give_up)
        threading.Thread(target=self._answer, args=(answer, key, name), daemon=True).start()

    def _submit(self, prompt: Sequence[int], sampling: dict[str, Any]) -> RequestHandle:
        """Queue a request; the model's own end tokens hold unless the request names others. Called from any thread."""
        if "eos_token_ids" not in sampling and not sampling.get("ignore_eos"):
            sampling["eos_token_ids"] = self.engine.manifest.model.eos_token_ids
        lists = {key: _tuples(value) for key, value in sampling.items()}
        return self.engine.scheduler.submit(prompt, SamplingParams(**lists))

    def _answer(self, answer: Answer, key: object, name: str) -> None:
        try:
            for event in answer.handle:
                answer.add(event)
            failure = answer.cut()
        except Exception as error:
            failure = failed(error)
        finally:
            self.answers.remove(name, answer)
            self.watcher.forget(key)
        answer.finish(failure)
        self.metrics.first_token(answer.handle)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


class Answer:
    """Turns token events into responses: one per token when streaming, else one at the end."""

    def __init__(self, sender: Sender, options: Options, prompt: list[int], exclude_input: bool, handle: RequestHandle) -> None:
        self.sender, self.options, self.prompt, self.handle = sender, options, prompt, handle
        self.given_up = False
        self.streaming = options.wants("stream")
        # A stream carries new tokens only, whatever the option says.
        self.exclude_input = exclude_input or self.streaming
        self.count, self.total_log_prob = 0, 0.0
        self.pending: list[int] = []
        self.log_probs: list[float] = []
        self.logits: list[Any] = []

    def add(self, event: TokenEvent) -> None:
        if not event.has_token:
            return
        self.pending.append(event.token)
        self.count += 1
        if event.logprob is not None:
            self.log_probs.append(event.logprob)
            self.total_log_prob += event.logprob
        if self.options.wants("return_generation_logits") and event.logits is not None:
            self.logits.append(event.logits)
        # The last token waits for finish(), whose response carries the final flag and the times.
        if self.streaming and event.finish_reason is None:
            self.sender.send(self._response())

    def give_up(self) -> None:
        """The client has gone, or has asked for the end: what there is then is all it wants."""
        self.given_up = True
        self.handle.cancel()

    def cut(self) -> Any:
        """The error of an answer that ended though nobody asked for it; None where it is whole."""
        if self.handle.finish_reason != "cancelled" or self.given_up:
            return None
        text = "the engine was stopped before the answer was complete"
        return pb_utils.TritonError(text, pb_utils.TritonError.UNAVAILABLE)

    def finish(self, failure: Any) -> None:
        if failure is not None:
            self.sender.send(error_response(failure), flags=FINAL)
        else:
            self.sender.send(self._response(self.handle), flags=FINAL)

    def _response(self, handle: RequestHandle | None = None) -> Any:
        tokens = self.pending if self.exclude_input else self.prompt + self.pending
        # Cancelled between two tokens: there is nothing new, and tensors without elements are not for the wire.
        tensors = [tensor("output_ids", [[tokens]], np.int32)] if tokens else []
        tensors += [
            tensor("sequence_length", [[len(tokens)]], np.int32),
            tensor("batch_index", [[0]], np.int32),
            tensor("sequence_index", [[0]], np.int32),
        ]
        if self.options.wants("return_log_probs"):
            tensors.append(tensor("cum_log_probs", [[self.total_log_prob]], np.float32))
            if self.log_probs:
                tensors.append(tensor("output_log_probs", [[self.log_probs]], np.float32))
        if self.options.wants("return_generation_logits") and self.logits:
            tensors.append(tensor("generation_logits", [[self.logits]], np.float32))
        if handle is not None:
            tensors += self._closing(handle)
        self.pending, self.log_probs, self.logits = [], [], []
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _closing(self, handle: RequestHandle) -> list[Any]:
        """What only the last response carries."""
        tensors = []
        wants = self.options.wants
        if wants("return_context_logits") and handle.context_logits is not None:
            tensors.append(tensor("context_logits", [handle.context_logits], np.float32))
        if wants("return_num_input_tokens"):
            tensors.append(tensor("num_input_tokens", [[len(self.prompt)]], np.int32))
        if wants("return_num_output_tokens"):
            tensors.append(tensor("num_output_tokens", [[self.count]], np.int32))
        if wants("return_perf_metrics"):
            for name in ("arrival", "first_scheduled", "first_token", "last_token"):
                tensors.append(tensor(f"{name}_time_ns", [[getattr(handle.times, f"{name}_ns")]], np.int64))
        return tensors
