"""Text in, text out: tokenise, let the engine of the tokens model generate, detokenise as the tokens arrive.

Served as `ensemble`, or as `tensorrt_llm_bls` beside TensorRT-LLM's backend; which engine, and how it is reached, only
the link knows that the parameter `engine` names.
A Python model rather than a Triton ensemble, because a cancellation does not travel through an ensemble.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # what was copied beside this file, before anything that is installed

from engines.runtime.errors import RequestError
from engines.runtime.text import TextStream, Tokenizer
from triton_repo.interface import TEXT
from triton_repo.serving_inputs import (
    InputError,
    Options,
    check_room,
    parse_options,
    text_of,
    words_of,
)
from triton_repo.templates.shared.python_backend import (
    FINAL,
    Arrays,
    Header,
    Sender,
    Watcher,
    bad_request,
    error_response,
    failed,
    inputs_of,
    parameter,
    tensor,
)


class TritonPythonModel:
    """See the Python backend's documentation for the three methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.tokenizer = Tokenizer.load(HERE / "tokenizer")
        self.vocab_size = int(parameter(config, "vocab_size"))
        self.max_length = int(parameter(config, "max_length"))
        ends = parameter(config, "eos_token_ids", "")
        self.eos_token_ids = tuple(int(token) for token in ends.split(",") if token)
        self.exclude_input = parameter(config, "exclude_input_in_output", "false") == "true"
        self.link = importlib.import_module(f"triton_repo.templates.{parameter(config, 'engine', 'engine')}.link")
        self.address = self.link.address(HERE.parent)
        # Then this process has no thread but the server's: one request at a time, a cancellation is noticed at the next token.
        self.in_turn = parameter(config, "in_turn", "false") == "true"
        self.watcher = Watcher()

    def finalize(self) -> None:
        self.watcher.stop()

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                work = self._read(request, sender)
            except (InputError, RequestError) as error:
                sender.send(error_response(bad_request(error)), flags=FINAL)
                continue
            except Exception as error:
                sender.send(error_response(failed(error)), flags=FINAL)
                continue
            if self.in_turn:
                self._run(work)
            else:
                threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _read(self, request: Any, sender: Sender) -> Work:
        inputs = inputs_of(request)
        text = text_of(inputs, "text_input")
        options = parse_options(inputs, TEXT, self.vocab_size, self.link.ENGINE)
        stop_words, bad_words = words_of(inputs, "stop_words"), words_of(inputs, "bad_words")
        if len(text) > self.tokenizer.most_chars(self.max_length):
            raise InputError(
                f"text_input: the prompt is too long: {len(text)} characters cannot be fewer than {self.max_length} tokens. "
                "Shorten it."
            )
        prompt = self.tokenizer.encode(text)
        if not prompt:
            raise InputError("text_input: expected text of at least one token, found none.")
        check_room("text_input", len(prompt), "max_tokens", options.given["max_tokens"], self.max_length)
        sampling = dict(options.sampling)
        sampling.setdefault("eos_token_ids", self.eos_token_ids)
        if bad_words:
            # A word reads differently at the start of a line and after a space.
            forms = [form for word in bad_words for form in (word, " " + word)]
            sampling["bad_sequences"] = [self.tokenizer.encode(form, add_special_tokens=False) for form in forms]
        exclude = options.wants("exclude_input", self.exclude_input) or options.wants("stream")
        least = sampling.get("min_new_tokens", 0)
        stream = TextStream(self.tokenizer, tuple(stop_words), min_tokens=least, context=prompt)
        return Work(sender, options, prompt, sampling, stream, "" if exclude else text)

    def _run(self, work: Work) -> None:
        key = None
        try:
            link = self.link.EngineLink(self.address, work.prompt, work.sampling)
            if not self.in_turn:
                key = self.watcher.watch(work.sender, link.cancel)
            for header, arrays in link:
                if self.in_turn and work.sender.is_cancelled():
                    link.cancel()
                if work.stream.stopped and ("token" in header or "error" in header):
                    continue  # came before the engine noticed that the text has ended: the answer is whole
                if "error" in header:
                    raise EngineError(header)
                if header.get("end") == "cancelled" and not link.given_up:
                    raise EngineError(STOPPED)
                work.take(header, arrays)
                if work.stream.stopped:
                    link.cancel()
            work.close()
            failure = None
        except EngineError as error:
            failure = error.triton
        except Exception as error:
            failure = failed(error)
        if key is not None:
            self.watcher.forget(key)
        last = work.last() if failure is None else error_response(failure)
        if last is None:
            work.sender.send(flags=FINAL)
        else:
            work.sender.send(last, flags=FINAL)


STOPPED: Header = {"error": "the engine was stopped before the answer was complete", "kind": "ClosedError"}


class EngineError(Exception):
    """What the engine refused or failed, as the status a client should see."""

    def __init__(self, header: Header) -> None:
        codes = {"RequestError": pb_utils.TritonError.INVALID_ARG}
        codes |= dict.fromkeys(("CapacityError", "ClosedError"), pb_utils.TritonError.UNAVAILABLE)
        code = codes.get(header["kind"], pb_utils.TritonError.INTERNAL)
        self.triton = pb_utils.TritonError(header["error"], code)


class Work:
    """One request: collects text until there is something to send."""

    def __init__(
        self, sender: Sender, options: Options, prompt: list[int], sampling: dict[str, Any], stream: TextStream, prefix: str
    ) -> None:
        self.sender, self.options, self.prompt, self.sampling, self.stream = sender, options, prompt, sampling, stream
        self.streaming = options.wants("stream")
        self.text = prefix
        self.count = 0
        self.cum_log_prob = 0.0
        self.log_probs: list[float] = []
        self.logits: list[Any] = []
        self.closing: list[tuple[str, Any]] = []

    def take(self, header: Header, arrays: Arrays) -> None:
        """Add one token, or what comes with the end."""
        if "token" not in header:
            if arrays:
                self.closing.append(("context_logits", arrays[0][None]))
            if self.options.wants("return_perf_metrics"):
                self.closing += [(name, np.array([[value]], np.int64)) for name, value in header["times"].items()]
            return
        self.count += 1
        if header["logprob"] is not None:
            self.log_probs.append(header["logprob"])
            self.cum_log_prob += header["logprob"]
        if arrays:
            self.logits.append(arrays[0])
        self.text += self.stream.push(header["token"])
        # The last token's text waits for the response that ends the request: one without text would count as one more token.
        if self.streaming and self.text and not self.stream.stopped and not header["last"]:
            self.sender.send(self._response([]))

    def close(self) -> None:
        """Take the text that was held back."""
        if not self.stream.stopped:
            self.text += self.stream.flush()

    def last(self) -> Any:
        """The response that ends the request; None when a stream has sent everything."""
        closing = [pb_utils.Tensor(name, array) for name, array in self.closing]
        if self.options.wants("return_num_input_tokens"):
            closing.append(tensor("num_input_tokens", [[len(self.prompt)]], np.int32))
        if self.options.wants("return_num_output_tokens"):
            closing.append(tensor("num_output_tokens", [[self.count]], np.int32))
        if self.streaming and not (self.text or closing or self.log_probs or self.logits):
            return None
        return self._response(closing)

    def _response(self, closing: list[Any]) -> Any:
        tensors = [
            pb_utils.Tensor("text_output", np.asarray([[self.text.encode("utf-8")]], dtype=np.object_)),
            pb_utils.Tensor("batch_index", np.zeros((1, 1), np.int32)),
            pb_utils.Tensor("sequence_index", np.zeros((1, 1), np.int32)),
        ]
        if self.options.wants("return_log_probs"):
            tensors.append(pb_utils.Tensor("cum_log_probs", np.asarray([[self.cum_log_prob]], np.float32)))
            tensors.append(pb_utils.Tensor("output_log_probs", np.asarray([[self.log_probs]], np.float32)))
        if self.logits:
            tensors.append(pb_utils.Tensor("generation_logits", np.stack(self.logits)[None, None]))
        self.text, self.log_probs, self.logits = "", [], []
        return pb_utils.InferenceResponse(output_tensors=tensors + closing)
