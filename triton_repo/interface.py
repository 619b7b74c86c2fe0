"""The request interface, a row per input and output: what clients call it, its type, what it sets, and who honours it.

Everything else is made from these rows: every config.pbtxt (`triton_repo.config_pbtxt`), the parsers
(`triton_repo.serving_inputs`), the client's options, the bridge to TensorRT-LLM's backend, and the table in docs/serving.md.
Names, types and shapes are those of the public TensorRT-LLM model repositories. Copied into the model repository: it needs
the standard library alone.

To add a sampling parameter: one row in INPUTS, and the sampler (`engines.runtime.sampling`, `engines.runtime.sampler`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

TOKENS, TEXT, BACKEND, PYTORCH = "tokens", "text", "backend", "pytorch"
"""Interfaces: this project's tokens model; the text models; TensorRT-LLM's engine backend; TensorRT-LLM's PyTorch runtime
(llmapi)."""
NGPT, TENSORRT_LLM = "ngpt-deploy", "TensorRT-LLM's engine backend"
"""Whose engine a text model asks: this project's scheduler and sampler, or the backend."""
_INTERFACES = {NGPT: (TOKENS, TEXT), TENSORRT_LLM: (BACKEND,)}
"""Where an engine is reached: it does what one of these has a tensor for."""
WORD_LIST = (2, -1)
"""The shape of several token sequences in one tensor: their ids, and where each ends."""


@dataclass(frozen=True)
class Tensor:
    """A tensor on the wire: its name, Triton's type without "TYPE_", its shape without the batch (-1: any size)."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Range:
    """Values that are taken: whether one `holds`, how that is `said`, and what else there is to say."""

    holds: Callable[[Any], bool]
    said: str
    remedy: str = ""


@dataclass(frozen=True)
class Input:
    """An input of a request.

    option: its name in this project's client. tokens, text, backend, pytorch: the tensor of that interface, None where it
    has none. older: a name that is taken too. sets: the field of SamplingParams it becomes. neutral: the value that asks for
    nothing. range: the values that make sense to any server. only: those that can be served here. asks: whether it chooses
    what is returned.
    """

    option: str
    about: str
    tokens: Tensor | None = None
    text: Tensor | None = None
    backend: Tensor | None = None
    pytorch: Tensor | None = None
    required: bool = False
    older: str = ""
    sets: str = ""
    neutral: Any = None
    range: Range | None = None
    only: Range | None = None
    asks: bool = False

    def of(self, interface: str) -> Tensor | None:
        """The tensor of an interface."""
        found: Tensor | None = getattr(self, interface)
        return found

    def dtype(self) -> str:
        """Triton's type; the same in every interface for what is one value."""
        return next(t.dtype for t in (self.tokens, self.text, self.pytorch) if t is not None)


@dataclass(frozen=True)
class Output:
    """An output, by interface as an input is."""

    tokens: Tensor | None = None
    text: Tensor | None = None
    pytorch: Tensor | None = None
    when: str = ""

    def of(self, interface: str) -> Tensor | None:
        """The tensor of an interface; the backend's are those of the tokens model."""
        found: Tensor | None = getattr(self, TOKENS if interface == BACKEND else interface)
        return found


def _option(
    option: str,
    dtype: str,
    about: str,
    *,
    tokens: str | None = None,
    text: str | None = None,
    backend: bool = True,
    pytorch: str = "",
    **more: Any,
) -> Input:
    """One value, under its own name where no other is given; `backend`: whether TensorRT-LLM's backend has it, by the tokens
    name."""
    wire = Tensor(tokens or option, dtype)
    return Input(
        option,
        about,
        tokens=wire,
        text=Tensor(text or option, dtype),
        backend=wire if backend else None,
        pytorch=Tensor(pytorch, dtype) if pytorch else None,
        **more,
    )


_AT_LEAST_0 = Range(lambda value: value >= 0, "0 or more")
_SHARE = Range(lambda value: 0.0 <= value <= 1.0, "0 to 1")
_SINGLE = Range(lambda value: value in (0, 1), "1", "Beam search and several sequences are not supported.")
INPUTS: tuple[Input, ...] = (
    Input(
        "prompt", "the text", text=Tensor("text_input", "STRING"), pytorch=Tensor("text_input", "STRING", (-1,)), required=True
    ),
    Input(
        "input_ids",
        "the prompt's token ids",
        tokens=Tensor("input_ids", "INT32", (-1,)),
        backend=Tensor("input_ids", "INT32", (-1,)),
        required=True,
    ),
    Input(
        "input_lengths",
        "how many of them",
        tokens=Tensor("input_lengths", "INT32"),
        backend=Tensor("input_lengths", "INT32"),
        required=True,
    ),
    _option(
        "max_tokens",
        "INT32",
        "most new tokens",
        tokens="request_output_len",
        pytorch="sampling_param_max_tokens",
        required=True,
        sets="max_new_tokens",
        range=Range(lambda value: value >= 1, "at least 1", "Say how many tokens to generate."),
    ),
    _option("num_return_sequences", "INT32", "always one", only=_SINGLE, range=_AT_LEAST_0, neutral=1),
    Input(
        "bad_words",
        "texts that must not come",
        tokens=Tensor("bad_words_list", "INT32", WORD_LIST),
        text=Tensor("bad_words", "STRING", (-1,)),
        backend=Tensor("bad_words_list", "INT32", WORD_LIST),
        sets="bad_sequences",
    ),
    Input(
        "stop_words",
        "texts that end the answer, and are not in it",
        tokens=Tensor("stop_words_list", "INT32", WORD_LIST),
        text=Tensor("stop_words", "STRING", (-1,)),
        backend=Tensor("stop_words_list", "INT32", WORD_LIST),
        pytorch=Tensor("sampling_param_stop", "STRING", (-1,)),
        sets="stop_sequences",
    ),
    _option(
        "exclude_input",
        "BOOL",
        "leave the prompt out of an answer that is not streamed",
        tokens="exclude_input_in_output",
        text="exclude_input_in_output",
        pytorch="sampling_param_exclude_input_from_output",
        asks=True,
    ),
    _option(
        "end_id",
        "INT32",
        "the token that ends a text, in place of the model's; -1: none does",
        range=Range(lambda value: value >= -1, "a token id, or -1 for none"),
    ),
    _option("pad_id", "INT32", "taken and not used"),
    _option(
        "top_k",
        "INT32",
        "draw from so many most probable tokens",
        tokens="runtime_top_k",
        pytorch="sampling_param_top_k",
        sets="top_k",
        neutral=0,
        range=_AT_LEAST_0,
    ),
    _option(
        "top_p",
        "FP32",
        "draw from the most probable tokens that have this probability together",
        tokens="runtime_top_p",
        pytorch="sampling_param_top_p",
        sets="top_p",
        neutral=0.0,
        range=_SHARE,
    ),
    _option(
        "min_p",
        "FP32",
        "draw from the tokens that have at least this share of the largest probability",
        backend=False,
        sets="min_p",
        neutral=0.0,
        range=_SHARE,
    ),
    _option(
        "temperature",
        "FP32",
        "of the distribution that is drawn from; 0: the most probable token",
        pytorch="sampling_param_temperature",
        sets="temperature",
        range=_AT_LEAST_0,
    ),
    _option(
        "length_penalty",
        "FP32",
        "for beam search, which is not offered",
        tokens="len_penalty",
        only=Range(lambda value: value in (0.0, 1.0), "0 or 1", "It is for beam search only."),
        neutral=1.0,
    ),
    _option(
        "repetition_penalty",
        "FP32",
        "divides the logits of tokens that were there",
        sets="repetition_penalty",
        neutral=1.0,
        range=Range(lambda value: value > 0.0, "more than 0"),
    ),
    _option(
        "min_tokens",
        "INT32",
        "so many tokens come before a text may end",
        older="min_length",
        sets="min_new_tokens",
        neutral=0,
        range=_AT_LEAST_0,
    ),
    _option(
        "presence_penalty",
        "FP32",
        "taken once from the logit of every token of the answer",
        pytorch="sampling_param_presence_penalty",
        sets="presence_penalty",
        neutral=0.0,
    ),
    _option(
        "frequency_penalty",
        "FP32",
        "taken from it for each time it came",
        pytorch="sampling_param_frequency_penalty",
        sets="frequency_penalty",
        neutral=0.0,
    ),
    _option("seed", "UINT64", "of the random numbers", pytorch="sampling_param_seed", sets="seed"),
    _option("return_log_probs", "BOOL", "log-probabilities of the new tokens", sets="logprobs", neutral=False, asks=True),
    _option(
        "return_context_logits",
        "BOOL",
        "logits of every token of the prompt",
        sets="return_context_logits",
        neutral=False,
        asks=True,
    ),
    _option(
        "return_generation_logits",
        "BOOL",
        "the logits that each new token was chosen from",
        sets="return_generation_logits",
        neutral=False,
        asks=True,
    ),
    _option("return_num_input_tokens", "BOOL", "tokens of the prompt", asks=True),
    _option("return_num_output_tokens", "BOOL", "new tokens", asks=True),
    _option("return_perf_metrics", "BOOL", "when it arrived, began, and gave its first and last token", asks=True),
    _option("beam_width", "INT32", "always one", only=_SINGLE, range=_AT_LEAST_0, neutral=1),
    _option("stream", "BOOL", "answer piece by piece", tokens="streaming", text="stream", pytorch="streaming", asks=True),
    Input(
        "stop",
        "end the request of this id",
        tokens=Tensor("stop", "BOOL"),
        backend=Tensor("stop", "BOOL"),
        pytorch=Tensor("stop", "BOOL"),
    ),
    Input("best_of", "sequences to choose from", pytorch=Tensor("sampling_param_best_of", "INT32")),
    Input("return_finish_reason", "how it ended", pytorch=Tensor("return_finish_reason", "BOOL"), asks=True),
    Input("return_stop_reason", "what stopped it", pytorch=Tensor("return_stop_reason", "BOOL"), asks=True),
    Input(
        "return_cumulative_logprob",
        "the sum of the log-probabilities",
        pytorch=Tensor("return_cumulative_logprob", "BOOL"),
        asks=True,
    ),
)
"""In the order in which configurations list them."""


def _both(name: str, dtype: str, dims: tuple[int, ...], when: str = "") -> Output:
    tensor = Tensor(name, dtype, dims)
    return Output(tokens=tensor, text=tensor, when=when)


OUTPUTS: tuple[Output, ...] = (
    Output(text=Tensor("text_output", "STRING", (-1,)), pytorch=Tensor("text_output", "STRING", (-1,))),
    Output(tokens=Tensor("output_ids", "INT32", (-1, -1))),
    Output(tokens=Tensor("sequence_length", "INT32", (-1,))),
    _both("cum_log_probs", "FP32", (-1,), "return_log_probs"),
    _both("output_log_probs", "FP32", (-1, -1), "return_log_probs"),
    _both("context_logits", "FP32", (-1, -1), "return_context_logits"),
    _both("generation_logits", "FP32", (-1, -1, -1), "return_generation_logits"),
    _both("batch_index", "INT32", (1,)),
    _both("sequence_index", "INT32", (1,)),
    _both("num_input_tokens", "INT32", (1,), "return_num_input_tokens"),
    _both("num_output_tokens", "INT32", (1,), "return_num_output_tokens"),
    _both("arrival_time_ns", "INT64", (1,), "return_perf_metrics"),
    _both("first_scheduled_time_ns", "INT64", (1,), "return_perf_metrics"),
    _both("first_token_time_ns", "INT64", (1,), "return_perf_metrics"),
    _both("last_token_time_ns", "INT64", (1,), "return_perf_metrics"),
    Output(pytorch=Tensor("finish_reason", "STRING", (-1,)), when="return_finish_reason"),
    Output(pytorch=Tensor("stop_reason", "STRING", (-1,)), when="return_stop_reason"),
    Output(pytorch=Tensor("cumulative_logprob", "FP32", (-1,)), when="return_cumulative_logprob"),
)


def inputs(interface: str) -> Iterator[tuple[Input, Tensor]]:
    """The inputs of an interface, with their tensors."""
    for row in INPUTS:
        if (tensor := row.of(interface)) is not None:
            yield row, tensor


def outputs(interface: str) -> Iterator[tuple[Output, Tensor]]:
    """The outputs of an interface, with their tensors."""
    for row in OUTPUTS:
        if (tensor := row.of(interface)) is not None:
            yield row, tensor


def options(interface: str) -> dict[str, Input]:
    """The rows that are one value each of a request, by option: all but prompts, word lists and `stop`."""
    return {
        row.option: row
        for row, tensor in inputs(interface)
        if tensor.dims == (1,) and row.option not in ("prompt", "input_lengths", "stop")
    }


def honoured(row: Input, engine: str) -> bool:
    """Whether an engine (NGPT or TENSORRT_LLM) does what the row asks for."""
    return any(row.of(interface) is not None for interface in _INTERFACES[engine])
