"""What an engine says of one request, turned into responses: a text, token ids, or both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from engines.runtime.events import FinishReason, Times, TokenEvent
from engines.runtime.text import TextStream, Tokenizer
from triton_repo.serving_inputs import Options
from triton_repo.templates.shared.python_backend import FINAL, Sender, strings, tensor

MOMENTS = ("arrival", "first_scheduled", "first_token", "last_token")


class Answer:
    """Sends one response for each new piece when the request streams, else one at the end.

    prompt: the prompt's token ids. before: what stands in front of an answer that is not streamed, as (text, ids). stream:
    turns tokens into text and looks for stop words; None where neither is wanted. text, ids: what the answer consists of.
    ends: tokens that are in no text where they end it. wanted: names of the outputs that the client asked for.
    """

    def __init__(
        self,
        sender: Sender,
        options: Options,
        prompt: Sequence[int],
        *,
        before: tuple[str, Sequence[int]] = ("", ()),
        stream: TextStream | None = None,
        text: bool = True,
        ids: bool = False,
        ends: Collection[int] = (),
        wanted: Collection[str] = (),
    ) -> None:
        self._sender, self._options, self._prompt, self._stream = sender, options, prompt, stream
        self._gives_text, self._gives_ids, self._wanted = text and stream is not None, ids, wanted
        self._ends, self._flushed = ends, False
        self._streaming = options.wants("stream")
        self._text, self._ids = before[0], list(before[1])
        self.count = 0
        self._sent, self._total = 0, 0.0
        self._log_probs: list[float] = []
        self._top: list[tuple[tuple[int, float], ...]] = []
        self._logits: list[NDArray[np.float32]] = []

    @property
    def stopped(self) -> bool:
        """Whether the text has ended by a stop word: what the engine says then is not wanted any more."""
        return self._stream is not None and self._stream.stopped

    def take(self, event: TokenEvent) -> None:
        """Add a token."""
        self.count += 1
        self._ids.append(event.token)
        if event.logprob is not None:
            self._log_probs.append(event.logprob)
            self._total += event.logprob
        if self._options.given.get("top_logprobs"):
            self._top.append(event.top_logprobs)
        if event.logits is not None and self._options.wants("return_generation_logits"):
            self._logits.append(event.logits)
        if self._stream is not None:
            if event.finish_reason in ("eos", "stop") and event.token in self._ends:
                self._text += self._stream.flush()
                self._stream.push(event.token)  # it may be spelled like a stop word
                self._flushed = True
            else:
                self._text += self._stream.push(event.token)
        # The last token waits for the response that ends the request: one more without text would count as a token more.
        last = event.finish_reason is not None or self.stopped
        if self._streaming and not last and (self._text or self._gives_ids):
            self._send([])

    def finish(self, reason: FinishReason | None, times: Times | None, context_logits: NDArray[np.float32] | None) -> None:
        """Send what is left, and how it ended."""
        if self._stream is not None and not self.stopped and not self._flushed:
            self._text += self._stream.flush()
        closing = self._closing(reason, times, context_logits)
        nothing = not (closing or self._log_probs or self._logits or self._top)
        nothing = nothing and not (self._text and self._gives_text) and not (self._ids and self._gives_ids)
        if self._streaming and self._sent and nothing:
            self._sender.send(flags=FINAL)
        else:  # a stream of no event at all would leave its reader without an answer
            self._send(closing, flags=FINAL)

    def _send(self, closing: list[Any], flags: int = 0) -> None:
        tensors = [tensor("batch_index", [[0]], np.int32), tensor("sequence_index", [[0]], np.int32)]
        if self._gives_text:
            tensors.append(strings("text_output", [self._text]))
        if self._gives_ids:
            if self._ids:  # tensors without elements are not for the wire
                tensors.append(tensor("output_ids", [[self._ids]], np.int32))
            tensors.append(tensor("sequence_length", [[len(self._ids)]], np.int32))
        if self._options.wants("return_log_probs"):
            tensors.append(tensor("cum_log_probs", [[self._total]], np.float32))
            if self._log_probs:
                tensors.append(tensor("output_log_probs", [[self._log_probs]], np.float32))
        if self._top:
            tensors.append(tensor("top_log_prob_ids", [[[[pair[0] for pair in row] for row in self._top]]], np.int32))
            tensors.append(tensor("top_log_probs", [[[[pair[1] for pair in row] for row in self._top]]], np.float32))
        if self._logits:
            tensors.append(tensor("generation_logits", [[self._logits]], np.float32))
        self._text, self._ids, self._log_probs, self._top, self._logits = "", [], [], [], []
        self._sent += 1
        tensors += closing
        if self._wanted:  # what a client did not ask for need not be carried to it
            tensors = [each for each in tensors if each.name() in self._wanted]
        if not tensors and not flags:
            return
        self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)

    def _closing(self, reason: FinishReason | None, times: Times | None, context: NDArray[np.float32] | None) -> list[Any]:
        """What only the last response carries."""
        tensors, wants = [], self._options.wants
        if context is not None and wants("return_context_logits"):
            tensors.append(tensor("context_logits", [context], np.float32))
        if wants("return_num_input_tokens"):
            tensors.append(tensor("num_input_tokens", [[len(self._prompt)]], np.int32))
        if wants("return_num_output_tokens"):
            tensors.append(tensor("num_output_tokens", [[self.count]], np.int32))
        if wants("return_perf_metrics") and times is not None:
            for name in MOMENTS:
                tensors.append(tensor(f"{name}_time_ns", [[getattr(times, f"{name}_ns")]], np.int64))
        if wants("return_finish_reason"):
            met = self._stream.stop_string if self._stream is not None and self.stopped else None
            ended = "stop" if met is not None or reason in ("eos", "stop") else reason or "stop"
            tensors += [strings("finish_reason", [ended]), strings("stop_reason", [met or ""])]
        return tensors


def word_forms(tokenizer: Tokenizer, words: Sequence[str]) -> list[tuple[int, ...]]:
    """The token sequences that spell the words: one reads differently at the start of a line and after a space."""
    forms = [form for word in words for form in (word, " " + word)]
    return [tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms]
