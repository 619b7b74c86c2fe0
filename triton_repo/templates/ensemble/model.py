"""Text in, text out: tokenise, let the tokens model generate, detokenise as the tokens arrive.

A Python model rather than a Triton ensemble, because a cancellation does not travel through an ensemble.
"""

import json
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from runtime.errors import RequestError  # noqa: E402
from runtime.text import TextStream, Tokenizer  # noqa: E402
from serving_inputs import (  # noqa: E402
    OPTION_DTYPES,
    TEXT_NAMES,
    TOKENS_NAMES,
    InputError,
    check_room,
    parse_options,
    sequences_array,
    text_of,
    words_of,
)
from serving_triton import FINAL, bad_request, error_response, inputs_of, parameter  # noqa: E402

TOKENS_MODEL = "tensorrt_llm"
# Outputs of the tokens model that go to the client as they are, from its last response.
CLOSING = (
    "context_logits",
    "num_input_tokens",
    "arrival_time_ns",
    "first_scheduled_time_ns",
    "first_token_time_ns",
    "last_token_time_ns",
)
ASKED = ("output_ids", "cum_log_probs", "output_log_probs", "generation_logits", *CLOSING)
# Options that this model sees to itself.
OWN = ("stream", "exclude_input", "return_num_output_tokens")


class TritonPythonModel:
    """See the Python backend's documentation for the three methods."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.tokenizer = Tokenizer.load(HERE / "tokenizer")
        self.vocab_size = int(parameter(config, "vocab_size"))
        self.max_length = int(parameter(config, "max_length"))
        self.exclude_input = parameter(config, "exclude_input_in_output", "false") == "true"

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                work = self._read(request, sender)
            except (InputError, RequestError) as error:
                sender.send(error_response(bad_request(error)), flags=FINAL)
                continue
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                pb_utils.Logger.log_error(text)
                sender.send(error_response(pb_utils.TritonError(text)), flags=FINAL)
                continue
            threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _read(self, request, sender):
        inputs = inputs_of(request)
        text = text_of(inputs, "text_input")
        options = parse_options(inputs, TEXT_NAMES, self.vocab_size)
        stop_words, bad_words = words_of(inputs, "stop_words"), words_of(inputs, "bad_words")
        prompt = self.tokenizer.encode(text)
        if not prompt:
            raise InputError("text_input: expected text of at least one token, found none.")
        check_room("text_input", len(prompt), "max_tokens", options.given["max_tokens"], self.max_length)
        # The id is ours alone: two clients may use the same request id, and a stop must not hit the other one.
        name = f"{request.request_id()}-{uuid.uuid4().hex}"
        tensors = [
            pb_utils.Tensor("input_ids", np.asarray([prompt], np.int32)),
            pb_utils.Tensor("input_lengths", np.asarray([[len(prompt)]], np.int32)),
            pb_utils.Tensor("streaming", np.asarray([[True]])),
        ]
        for option, value in options.given.items():
            if option not in OWN:
                tensors.append(pb_utils.Tensor(TOKENS_NAMES[option], np.asarray([[value]], OPTION_DTYPES[option])))
        if bad_words:
            # A word reads differently at the start of a line and after a space.
            variants = {
                tuple(self.tokenizer.encode(form, add_special_tokens=False)) for word in bad_words for form in (word, " " + word)
            }
            tensors.append(pb_utils.Tensor("bad_words_list", sequences_array(sorted(variants))[None]))
        inner = pb_utils.InferenceRequest(
            model_name=TOKENS_MODEL, request_id=name, requested_output_names=list(ASKED), inputs=tensors
        )
        exclude = options.wants("exclude_input", self.exclude_input) or options.wants("stream")
        stream = TextStream(self.tokenizer, tuple(stop_words))
        return Work(sender, options, inner, name, stream, "" if exclude else text)

    def _run(self, work):
        error = None
        try:
            for response in locked(work.inner.exec, decoupled=True):
                # Every response is taken, also those that come after the end: the iterator must not be left early.
                if error is not None or work.ended:
                    continue
                if response.has_error():
                    error = response.error()
                elif work.take(response) or work.cancelled():
                    send_stop(work.name)
            work.close()
        except Exception as caught:
            pb_utils.Logger.log_error(f"{type(caught).__name__}: {caught}")
            error = pb_utils.TritonError(f"{type(caught).__name__}: {caught}")
        if error is not None:
            locked(work.sender.send, error_response(error), flags=FINAL)
        else:
            locked(work.sender.send, work.last(), flags=FINAL)


def send_stop(name):
    """Free the slot of the inner request with this id; nothing happens when it has already finished."""
    stop = pb_utils.InferenceRequest(
        model_name=TOKENS_MODEL,
        request_id=name,
        requested_output_names=["output_ids"],
        inputs=[
            pb_utils.Tensor("input_ids", np.zeros((1, 1), np.int32)),
            pb_utils.Tensor("input_lengths", np.ones((1, 1), np.int32)),
            pb_utils.Tensor("request_output_len", np.ones((1, 1), np.int32)),
            pb_utils.Tensor("stop", np.asarray([[True]])),
        ],
    )
    for _response in locked(stop.exec, decoupled=True):
        pass


LOCK = threading.Lock()


def locked(call, *args, **options):
    """One call into the server at a time: with many threads in it at once, responses of other models were seen to get lost."""
    with LOCK:
        return call(*args, **options)


class Work:
    """One request: collects text until there is something to send."""

    def __init__(self, sender, options, inner, name, stream, prefix):
        self.sender, self.options, self.inner, self.name, self.stream = sender, options, inner, name, stream
        self.streaming = options.wants("stream")
        self.ended = False
        self.text = prefix
        self.count = 0
        self.cum_log_prob = 0.0
        self.log_probs, self.logits, self.closing = [], [], []

    def take(self, response):
        """Add the tokens of one inner response; True when a stop string has ended the text."""
        ids = pb_utils.get_output_tensor_by_name(response, "output_ids")
        if ids is None:
            return False
        self._take_extras(response)
        for token in ids.as_numpy().reshape(-1).tolist():
            self.count += 1
            self.text += self.stream.push(token)
            if self.stream.stopped:
                self.ended = True
                return True
        if self.streaming and self.text:
            locked(self.sender.send, self._response([]))
        return False

    def cancelled(self):
        """Whether the client has gone. Asked between two responses."""
        self.ended = self.ended or locked(self.sender.is_cancelled)
        return self.ended

    def close(self):
        """Take the text that was held back."""
        if not self.stream.stopped:
            self.text += self.stream.flush()

    def last(self):
        """The response that ends the request."""
        closing = [pb_utils.Tensor(name, array) for name, array in self.closing]
        if self.options.wants("return_num_output_tokens"):
            closing.append(pb_utils.Tensor("num_output_tokens", np.asarray([[self.count]], np.int32)))
        return self._response(closing)

    def _take_extras(self, response):
        if self.options.wants("return_log_probs"):
            self.log_probs += array_of(response, "output_log_probs").reshape(-1).tolist()
            self.cum_log_prob = float(array_of(response, "cum_log_probs").reshape(-1)[-1])
        if self.options.wants("return_generation_logits"):
            logits = array_of(response, "generation_logits")
            if logits.size:
                self.logits.append(logits)
        for name in CLOSING:
            found = pb_utils.get_output_tensor_by_name(response, name)
            if found is not None:
                self.closing.append((name, np.array(found.as_numpy())))

    def _response(self, closing):
        tensors = [
            pb_utils.Tensor("text_output", np.asarray([[self.text.encode("utf-8")]], dtype=np.object_)),
            pb_utils.Tensor("batch_index", np.zeros((1, 1), np.int32)),
            pb_utils.Tensor("sequence_index", np.zeros((1, 1), np.int32)),
        ]
        if self.options.wants("return_log_probs"):
            tensors.append(pb_utils.Tensor("cum_log_probs", np.asarray([[self.cum_log_prob]], np.float32)))
            tensors.append(pb_utils.Tensor("output_log_probs", np.asarray([[self.log_probs]], np.float32)))
        if self.logits:
            tensors.append(pb_utils.Tensor("generation_logits", np.concatenate(self.logits, axis=2)))
        self.text, self.log_probs, self.logits = "", [], []
        return pb_utils.InferenceResponse(output_tensors=tensors + closing)


def array_of(response, name):
    """An output as a copy of its own (the server's memory goes with the response), empty when it is not there."""
    found = pb_utils.get_output_tensor_by_name(response, name)
    return np.zeros((0,), np.float32) if found is None else np.array(found.as_numpy())
