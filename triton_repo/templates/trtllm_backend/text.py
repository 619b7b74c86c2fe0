"""Text in, text out beside TensorRT-LLM's own backend: tokenise, let its engine generate, detokenise as the tokens arrive.

A Python model rather than a Triton ensemble, because a cancellation does not travel through an ensemble. This process has no
thread but the server's, and takes its requests in turn: several model-to-model calls at once hang the Python backend of
tritonserver 2.51. So there are several instances, and a cancellation is noticed at the next token.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # what was copied beside this file, before anything that is installed

from engines.runtime.errors import RequestError
from engines.runtime.text import TextStream, Tokenizer
from triton_repo.copies import check_copies
from triton_repo.interface import TENSORRT_LLM, TEXT
from triton_repo.serving_inputs import InputError, Inputs, check_room, parse_options, text_of, words_of
from triton_repo.templates.shared.answer import Answer, word_forms
from triton_repo.templates.shared.python_backend import (
    FINAL,
    Sender,
    bad_request,
    error_response,
    failed,
    inputs_of,
    parameter,
)
from triton_repo.templates.trtllm_backend.link import EngineLink, Refusal


class TritonPythonModel:
    """See the Python backend's documentation for the three methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        check_copies(HERE, config)
        self.tokenizer = Tokenizer.load(HERE / "tokenizer")
        self.vocab_size = int(parameter(config, "vocab_size"))
        self.max_length = int(parameter(config, "max_length"))
        ends = parameter(config, "eos_token_ids", "")
        self.eos_token_ids = tuple(int(token) for token in ends.split(",") if token)
        self.exclude_input = parameter(config, "exclude_input_in_output", "false") == "true"
        self.special_tokens = parameter(config, "add_special_tokens", "true") == "true"

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._serve(inputs_of(request), set(request.requested_output_names()), sender)
            except (InputError, RequestError) as error:
                sender.send(error_response(bad_request(error)), flags=FINAL)
            except Refusal as refusal:
                sender.send(error_response(refusal.error), flags=FINAL)
            except Exception as error:
                sender.send(error_response(failed(error)), flags=FINAL)

    def _serve(self, inputs: Inputs, wanted: set[str], sender: Sender) -> None:
        text = text_of(inputs, "text_input")
        options = parse_options(inputs, TEXT, self.vocab_size, TENSORRT_LLM)
        stop_words, bad_words = words_of(inputs, "stop_words"), words_of(inputs, "bad_words")
        self.tokenizer.check_length("text_input", text, self.max_length)
        prompt = self.tokenizer.encode(text, add_special_tokens=options.wants("add_special_tokens", self.special_tokens))
        if not prompt:
            raise InputError("text_input: expected text of at least one token, found none.")
        check_room("text_input", len(prompt), "max_tokens", options.given["max_tokens"], self.max_length)
        sampling = dict(options.sampling)
        sampling.setdefault("eos_token_ids", self.eos_token_ids)
        if bad_words:
            sampling["bad_sequences"] = word_forms(self.tokenizer, bad_words)
        least, skip = sampling.get("min_new_tokens", 0), options.wants("skip_special_tokens", True)
        stream = TextStream(self.tokenizer, tuple(stop_words), min_tokens=least, skip_special_tokens=skip, context=prompt)
        exclude = options.wants("exclude_input", self.exclude_input) or options.wants("stream")
        ids = options.wants("return_output_ids")
        before = "" if exclude else text
        answer = Answer(sender, options, prompt, before=(before, ()), stream=stream, ids=ids, wanted=wanted)
        link, ended = EngineLink("tensorrt_llm", prompt, sampling), False
        for event in link:
            if sender.is_cancelled():
                link.cancel()
            if not answer.stopped:
                answer.take(event)
                ended = ended or event.token in sampling["eos_token_ids"]
            if answer.stopped:
                link.cancel()
        full = answer.count >= options.given["max_tokens"] and not ended
        answer.finish("length" if full else "stop", link.times, link.context_logits)
