"""The request interface, a row per input and output: what clients call it, its type, what it sets, and who honours it.

Everything else is made from these rows: every config.pbtxt (`triton_repo.config_pbtxt`), the parsers
(`triton_repo.serving_inputs`), the client's options, the bridge to TensorRT-LLM's backend, and the table in docs/serving.md.
Names, types and shapes are those of the public TensorRT-LLM model repositories. Copied into the model repository:
it needs the standard library alone.

To add a sampling parameter: one row in INPUTS, and the sampler (`engines.runtime.sampling`, `engines.runtime.sampler`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from triton_repo.tensors import (
    BACKEND,
    MODEL,
    NGPT,
    PYTORCH,
    TENSORRT_LLM,
    TEXT,
    TOKENS,
    WORD_LIST,
    Input,
    Output,
    Range,
    Refused,
    Tensor,
)

__all__ = [
    "BACKEND", "INPUTS", "MODEL", "NGPT", "OUTPUTS", "PYTORCH", "REFUSED", "TENSORRT_LLM", "TEXT", "TOKENS", "WORD_LIST", "Input",
    "Output", "Range", "Refused", "Tensor", "declared", "honoured", "inputs", "options", "outputs",
]  # fmt: skip
_INTERFACES = {NGPT: (TOKENS, TEXT), TENSORRT_LLM: (BACKEND,)}
"""Where an engine is reached: it does what one of these has a tensor for."""


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


def _local(option: str, about: str, *, tokens: bool = True, pytorch: bool = False) -> Input:
    """A Boolean that the model in front of the engine heeds, and no engine sees."""
    wire = Tensor(option, "BOOL")
    return Input(
        option, about, tokens=wire if tokens else None, text=wire, pytorch=wire if pytorch else None, asks=True, local=True
    )


_AT_LEAST_0 = Range(lambda value: value >= 0, "0 or more")
_SHARE = Range(lambda value: 0.0 <= value <= 1.0, "0 to 1")
_SINGLE = Range(lambda value: value in (0, 1), "1", "Beam search and several sequences are not supported.")
INPUTS: tuple[Input, ...] = (
    Input(
        "prompt",
        "the text",
        text=Tensor("text_input", "STRING"),
        pytorch=Tensor("text_input", "STRING", (-1,)),
        local=True,
        required=True,
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
        older=("max_new_tokens",),
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
        older=("exclude_input_from_output",),
        asks=True,
    ),
    _option(
        "end_id",
        "INT32",
        "the token that ends a text, in place of the model's; -1: none does",
        range=Range(lambda value: value >= -1, "a token id, or -1 for none"),
    ),
    _option(
        "ignore_eos",
        "BOOL",
        "go on after the token that ends a text",
        backend=False,
        sets="ignore_eos",
        neutral=False,
        local=True,
    ),
    _option("pad_id", "INT32", "taken and not used"),
    _local(
        "add_special_tokens", "the tokenizer adds its own, such as a bos; a rendered chat template has them already", tokens=False
    ),
    _local("skip_special_tokens", "leave special tokens out of the text; they are unless this is false", tokens=False),
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
        older=("min_length",),
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
    _option("seed", "UINT64", "of the random numbers", pytorch="sampling_param_seed", older=("random_seed",), sets="seed"),
    Input(
        "logit_bias_ids",
        "tokens whose logits are changed",
        tokens=Tensor("logit_bias_ids", "INT32", (-1,)),
        text=Tensor("logit_bias_ids", "INT32", (-1,)),
        sets="logit_bias",
    ),
    Input(
        "logit_bias_values",
        "what is added to each of them",
        tokens=Tensor("logit_bias_values", "FP32", (-1,)),
        text=Tensor("logit_bias_values", "FP32", (-1,)),
    ),
    Input(
        "guide_type",
        "what holds the answer to a form: json, json_schema, regex, choice, ebnf_grammar or lark_grammar",
        tokens=Tensor("guided_decoding_guide_type", "STRING"),
        text=Tensor("guided_decoding_guide_type", "STRING"),
        sets="guide",
    ),
    Input(
        "guide",
        "the schema, expression, list of texts or grammar",
        tokens=Tensor("guided_decoding_guide", "STRING"),
        text=Tensor("guided_decoding_guide", "STRING"),
    ),
    _option(
        "top_logprobs",
        "INT32",
        "so many most probable tokens are reported beside each new one",
        backend=False,
        sets="top_logprobs",
        neutral=0,
        range=Range(lambda value: 0 <= value <= 20, "0 to 20"),
        asks=True,
    ),
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
    _local("return_finish_reason", "why the answer ended", pytorch=True),
    _local("return_output_ids", "the new token ids beside the text"),
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
    Input("return_stop_reason", "what stopped it", pytorch=Tensor("return_stop_reason", "BOOL"), asks=True),
    Input(
        "return_cumulative_logprob",
        "the sum of the log-probabilities",
        pytorch=Tensor("return_cumulative_logprob", "BOOL"),
        asks=True,
    ),
)
"""In the order in which configurations list them."""


_BEAMS = "Beam search is not supported."
_LORA = "Adapters are not supported: merge them into the checkpoint."
REFUSED: tuple[Refused, ...] = (
    Refused(Tensor("n", "INT32"), 1, "Send one request for each answer."),
    Refused(Tensor("best_of", "INT32"), 1, "Send one request for each answer."),
    Refused(Tensor("use_beam_search", "BOOL"), False, _BEAMS),
    Refused(Tensor("num_beams", "INT32"), 1, _BEAMS),
    Refused(Tensor("beam_search_diversity_rate", "FP32"), 0.0, _BEAMS),
    Refused(Tensor("early_stopping", "BOOL"), False, _BEAMS),
    Refused(Tensor("lora_task_id", "UINT64"), None, _LORA),
    Refused(Tensor("lora_name", "STRING"), "", _LORA),
    Refused(Tensor("prompt_vocab_size", "INT32"), 0, "Prompt tuning is not supported."),
    Refused(Tensor("embedding_bias_words", "STRING", (-1,)), "", "Use logit_bias_ids and logit_bias_values."),
    Refused(Tensor("embedding_bias_weights", "FP32", (-1,)), None, "Use logit_bias_ids and logit_bias_values."),
    Refused(Tensor("no_repeat_ngram_size", "INT32"), 0, "Use repetition_penalty."),
    Refused(Tensor("runtime_top_p_min", "FP32"), 0.0, "Use min_p."),
    Refused(Tensor("runtime_top_p_decay", "FP32"), 0.0, "Use top_p."),
    Refused(Tensor("runtime_top_p_reset_ids", "INT32"), 0, "Use top_p."),
    Refused(Tensor("top_p_min", "FP32"), 0.0, "Use min_p."),
    Refused(Tensor("top_p_decay", "FP32"), 0.0, "Use top_p."),
    Refused(Tensor("top_p_reset_ids", "INT32"), 0, "Use top_p."),
    Refused(Tensor("sampling_parameters", "STRING"), "", "Send each parameter under its own name."),
)
"""What clients of other servers send to this project's own model, and it does not do."""


def _both(name: str, dtype: str, dims: tuple[int, ...], when: str = "", backend: bool = True) -> Output:
    tensor = Tensor(name, dtype, dims)
    return Output(tokens=tensor, text=tensor, when=when, backend=backend)


def _ending(name: str) -> Output:
    tensor = Tensor(name, "STRING", (-1,))
    return Output(tokens=tensor, text=tensor, pytorch=tensor, when="return_finish_reason", backend=False)


OUTPUTS: tuple[Output, ...] = (
    Output(text=Tensor("text_output", "STRING", (-1,)), pytorch=Tensor("text_output", "STRING", (-1,))),
    _both("output_ids", "INT32", (-1, -1), "return_output_ids"),
    _both("sequence_length", "INT32", (-1,), "return_output_ids"),
    _both("cum_log_probs", "FP32", (-1,), "return_log_probs"),
    _both("output_log_probs", "FP32", (-1, -1), "return_log_probs"),
    _both("context_logits", "FP32", (-1, -1), "return_context_logits"),
    _both("generation_logits", "FP32", (-1, -1, -1), "return_generation_logits"),
    _both("top_log_prob_ids", "INT32", (-1, -1, -1), "top_logprobs", backend=False),
    _both("top_log_probs", "FP32", (-1, -1, -1), "top_logprobs", backend=False),
    _both("batch_index", "INT32", (1,)),
    _both("sequence_index", "INT32", (1,)),
    _both("num_input_tokens", "INT32", (1,), "return_num_input_tokens"),
    _both("num_output_tokens", "INT32", (1,), "return_num_output_tokens"),
    _both("arrival_time_ns", "INT64", (1,), "return_perf_metrics"),
    _both("first_scheduled_time_ns", "INT64", (1,), "return_perf_metrics"),
    _both("first_token_time_ns", "INT64", (1,), "return_perf_metrics"),
    _both("last_token_time_ns", "INT64", (1,), "return_perf_metrics"),
    _ending("finish_reason"),
    _ending("stop_reason"),
    Output(pytorch=Tensor("cumulative_logprob", "FP32", (-1,)), when="return_cumulative_logprob"),
)


def inputs(interface: str) -> Iterator[tuple[Input, Tensor]]:
    """The inputs of an interface, with their tensors by their first names."""
    for row in INPUTS:
        if (tensor := row.of(interface)) is not None:
            yield row, tensor


def declared(interface: str) -> dict[str, Tensor]:
    """Every tensor that a configuration of the interface declares, by name: second names, and what is refused, included."""
    tensors = {tensor.name: tensor for row in INPUTS for tensor in row.tensors(interface)}
    return tensors | ({row.tensor.name: row.tensor for row in REFUSED} if interface == MODEL else {})


def outputs(interface: str) -> Iterator[tuple[Output, Tensor]]:
    """The outputs of an interface, with their tensors."""
    for row in OUTPUTS:
        if (tensor := row.of(interface)) is not None:
            yield row, tensor


def options(interface: str) -> dict[str, Input]:
    """The rows that are one number or truth value each of a request, by option: all but texts, lists and `stop`."""
    return {
        row.option: row
        for row, tensor in inputs(interface)
        if tensor.dims == (1,) and tensor.dtype != "STRING" and row.option not in ("input_lengths", "stop")
    }


def honoured(row: Input, engine: str) -> bool:
    """Whether an engine (NGPT or TENSORRT_LLM) does what the row asks for, or need not."""
    return row.local or any(row.of(interface) is not None for interface in _INTERFACES[engine])
