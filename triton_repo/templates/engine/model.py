"""Text or token ids in, text or token ids out: tokenizer, scheduler and engine in one process.

One process, so that the server sees every request where it is worked on: it waits for them when it is told to stop, several
instances and versions do not meet, and a cancellation frees its slot before the engine's next step.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # what was copied beside this file, before anything that is installed

from engines.runtime import Guide, RequestHandle, load_engine
from engines.runtime.cuda import use_device
from engines.runtime.errors import CapacityError, ClosedError, RequestError
from engines.runtime.text import TextStream, Tokenizer
from triton_repo.copies import check_copies
from triton_repo.interface import MODEL
from triton_repo.serving_inputs import (
    InputError,
    Inputs,
    check_room,
    guide_of,
    logit_bias,
    parse_options,
    prompt_tokens,
    refuse_foreign,
    scalar,
    text_of,
    word_lists,
    words_of,
)
from triton_repo.templates.shared.answer import Answer, word_forms
from triton_repo.templates.shared.python_backend import (
    FINAL,
    InFlight,
    Metrics,
    Sender,
    Watcher,
    bad_request,
    cut,
    error_response,
    failed,
    inputs_of,
    parameter,
    unavailable,
)

METRICS = {
    "ngpt_requests_active": ("active", "gauge", "Requests that hold a slot"),
    "ngpt_requests_queued": ("queued", "gauge", "Requests that wait for a slot"),
    "ngpt_slots": ("slots", "gauge", "Slots of the key-value cache"),
    "ngpt_queue_limit": ("queue_limit", "gauge", "Requests that may wait before further ones are refused"),
    "ngpt_prompt_tokens": ("prompt_tokens_total", "counter", "Prompt tokens read"),
    "ngpt_generated_tokens": ("generated_tokens_total", "counter", "Tokens generated"),
    "ngpt_requests_completed": ("completed_total", "counter", "Requests answered to their end"),
    "ngpt_requests_cancelled": ("cancelled_total", "counter", "Requests cancelled"),
    "ngpt_requests_failed": ("failed_total", "counter", "Requests that failed"),
    "ngpt_requests_rejected": ("rejected_total", "counter", "Requests that the scheduler refused, as a rule for a full queue"),
}


class TritonPythonModel:
    """See the Python backend's documentation for the methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        check_copies(HERE, config)
        if args.get("model_instance_kind") == "GPU":
            use_device(int(args["model_instance_device_id"]))
        threads = parameter(config, "threads")
        self.tokenizer = Tokenizer.load(HERE / "tokenizer") if (HERE / "tokenizer").is_dir() else None
        self.engine = load_engine(
            HERE / "engine",
            num_slots=int(parameter(config, "num_slots", "8")),
            threads=int(threads) if threads else None,
            prefill_chunk=int(parameter(config, "prefill_chunk", "256")),
            max_queue=int(parameter(config, "max_queue", "256")),
            tokenizer=self.tokenizer,
        )
        self.engine.scheduler.start()
        self.exclude_input = parameter(config, "exclude_input_in_output", "false") == "true"
        self.special_tokens = parameter(config, "add_special_tokens", "true") == "true"
        self.model = self.engine.manifest.model
        self.in_flight: InFlight[Request] = InFlight()
        labels = {"model": args["model_name"], "version": args.get("model_version", "1")}
        self.metrics = Metrics(labels | {"model_instance": args.get("model_instance_name", "0")}, METRICS)
        self.watcher = Watcher(lambda: self.metrics.update(self.engine.scheduler.stats))

    def is_ready(self) -> bool:
        """Whether requests are worked on; servers that know this method ask for it."""
        return self.engine.scheduler.running

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                inputs, name = inputs_of(request), request.request_id()
                if scalar(inputs, "stop"):
                    for running in self.in_flight.named(name):
                        running.give_up()
                    sender.send(flags=FINAL)
                    continue
                running = Request(sender, inputs, set(request.requested_output_names()))
            except (InputError, RequestError) as error:
                sender.send(error_response(bad_request(error)), flags=FINAL)
                continue
            except Exception as error:
                sender.send(error_response(failed(error)), flags=FINAL)
                continue
            # Known by its name before it is read, for a stop that follows at once must find it.
            self.in_flight.add(name, running)
            threading.Thread(target=self._serve, args=(running, name), daemon=True).start()

    def finalize(self) -> None:
        self.watcher.stop()
        self.engine.close()

    def _serve(self, running: Request, name: str) -> None:
        """Read, submit and answer one request, in a thread of its own: a long prompt holds up nobody else."""
        key, answer, handle, failure = self.watcher.watch(running.sender, running.give_up), None, None, None
        try:
            answer, handle = self._submit(running)
            for event in handle:
                if event.has_token and not answer.stopped:
                    answer.take(event)
                    if answer.stopped:
                        handle.cancel("stop")
            if handle.finish_reason == "cancelled" and not running.given_up and not answer.stopped:
                failure = cut()
        except (InputError, RequestError) as error:
            failure = bad_request(error)
        except (CapacityError, ClosedError) as error:
            failure = unavailable(error)
        except Exception as error:
            failure = failed(error)
        finally:
            self.in_flight.remove(name, running)
            self.watcher.forget(key)
        if failure is None and answer is not None and handle is not None:
            answer.finish(handle.finish_reason, handle.times, handle.context_logits)
            self.metrics.first_token(handle)
        else:
            running.sender.send(error_response(failure), flags=FINAL)

    def _submit(self, running: Request) -> tuple[Answer, RequestHandle]:
        inputs = running.inputs
        refuse_foreign(inputs)
        options = parse_options(inputs, MODEL, self.model.vocab_size)
        text, prompt = self._prompt(inputs, options.wants("add_special_tokens", self.special_tokens))
        room = self.model.max_length - len(prompt)
        usual = int(self.engine.manifest.generation.get("max_new_tokens", 0)) or room
        most = options.given.get("max_tokens", max(1, min(room, usual)))
        sent = "text_input" if text is not None else "input_ids"
        check_room(
            sent, len(prompt), "max_tokens" if "max_tokens" in inputs else "request_output_len", most, self.model.max_length
        )
        sampling = options.sampling | word_lists(inputs, self.model.vocab_size) | {"max_new_tokens": most}
        sampling["min_new_tokens"] = min(sampling.get("min_new_tokens", 0), most)
        if bias := logit_bias(inputs, self.model.vocab_size):
            sampling["logit_bias"] = bias
        if (guide := guide_of(inputs)) is not None:
            sampling["guide"] = Guide(*guide)
        stop, bad = words_of(inputs, "stop_words"), words_of(inputs, "bad_words")
        if bad:
            forms = word_forms(self._tokenizer("bad_words"), bad)
            sampling["bad_sequences"] = (*sampling.get("bad_sequences", ()), *forms)
        gives_text = self.tokenizer is not None and "text_output" in running.wanted
        stream = None
        if stop or gives_text:
            stream = TextStream(
                self._tokenizer("stop_words"),
                tuple(stop),
                min_tokens=sampling["min_new_tokens"],
                skip_special_tokens=options.wants("skip_special_tokens", True),
                context=prompt,
            )
        # A stream carries what is new, whatever the option says.
        whole = not (options.wants("exclude_input", self.exclude_input) or options.wants("stream"))
        stops = {sequence[0] for sequence in sampling.get("stop_sequences", ()) if len(sequence) == 1}
        answer = Answer(
            running.sender,
            options,
            prompt,
            before=("", ()) if not whole else (text, ()) if text is not None else ("", prompt),
            stream=stream,
            text=gives_text,
            ids=text is None or options.wants("return_output_ids"),
            ends={*sampling.get("eos_token_ids", self.model.eos_token_ids), *stops},
            wanted=running.wanted,
        )
        handle = self.engine.submit(prompt, **sampling)
        running.work_on(handle)
        return answer, handle

    def _prompt(self, inputs: Inputs, special_tokens: bool) -> tuple[str | None, list[int]]:
        """The text, None where token ids were sent, and its tokens."""
        if "text_input" not in inputs:
            if "input_ids" not in inputs:
                either = "text_input or input_ids" if self.tokenizer is not None else "input_ids"
                raise InputError(f"{either}: expected a prompt, found nothing.")
            return None, prompt_tokens(inputs, self.model.vocab_size)
        if "input_ids" in inputs:
            raise InputError("input_ids: expected one of text_input and input_ids, found both.")
        text, tokenizer = text_of(inputs, "text_input"), self._tokenizer("text_input")
        tokenizer.check_length("text_input", text, self.model.max_length)
        prompt = tokenizer.encode(text, add_special_tokens=special_tokens)
        if not prompt:
            raise InputError("text_input: expected text of at least one token, found none.")
        return text, prompt

    def _tokenizer(self, name: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{name}: expected token ids, found text. This engine has no tokenizer.")
        return self.tokenizer


class Request:
    """A request in flight, from before it is read until it is answered."""

    def __init__(self, sender: Sender, inputs: Inputs, wanted: set[str]) -> None:
        self.sender, self.inputs, self.wanted = sender, inputs, wanted
        self.given_up = False
        self._handle: RequestHandle | None = None

    def work_on(self, handle: RequestHandle) -> None:
        """It has been submitted."""
        self._handle = handle
        if self.given_up:
            handle.cancel()

    def give_up(self) -> None:
        """The client has gone, or has asked for the end: what there is then is all it wants."""
        self.given_up = True
        if self._handle is not None:
            self._handle.cancel()
