"""What clients send, checked: fields of OpenAI's interface, those that vLLM takes besides, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from triton_repo.openai.errors import ApiError

MAX_CHOICES = 128
MAX_STOP = 64
MAX_DEPTH = 100  # what is nested deeper, some library down the road cannot read
MAX_VALUES = 1 << 20
"""Of a body: numbers, texts, lists and objects. Reading them takes this process's time from all streams."""
MAX_BIASES = 1024
Item = TypeVar("Item")


class _FirstError(FailFast):
    """The first wrong entry is enough: an error for each of a million takes minutes and gigabytes."""

    __hash__ = object.__hash__  # unions of types want it


List = Annotated[list[Item], _FirstError()]
Finite = Annotated[float, Field(allow_inf_nan=False)]
IGNORED = {
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity", "request_id", "priority", "include_reasoning", "separate_reasoning",
    "detokenize", "guided_decoding_backend", "cache_salt",
}  # fmt: skip
"""Taken, and without effect: they do not change what is answered."""
REFUSED: dict[str, tuple[Any, str]] = {
    "use_beam_search": (False, "Beam search is not offered."),
    "length_penalty": (1.0, "It is for beam search, which is not offered."),
    "early_stopping": (False, "It is for beam search, which is not offered."),
    "suffix": ("", "There is no infilling."),
    "audio": (None, "The model gives text."),
    "modalities": (["text"], "The model gives text."),
    "prediction": (None, "Predicted outputs are not offered."),
    "web_search_options": (None, "There is no search."),
    "functions": (None, "Use tools."),
    "function_call": (None, "Use tool_choice."),
    "chat_template": (None, "The template is the server's: --chat-template."),
    "prompt_logprobs": (None, "Use echo with logprobs, of the completions endpoint."),
    "logits_processors": (None, "Use logit_bias or a guide."),
    "truncate_prompt_tokens": (None, "Shorten the prompt."),
    "lora": (None, "Adapters are not supported: merge them into the checkpoint."),
    "lora_name": (None, "Adapters are not supported: merge them into the checkpoint."),
    "lora_request": (None, "Adapters are not supported: merge them into the checkpoint."),
    "top_a": (0.0, "Use min_p."),
    "typical_p": (1.0, "Use min_p."),
    "mirostat": (0, "Use min_p."),
    "echo": (False, "It is for the completions endpoint."),
    "include_stop_str_in_output": (False, "stop_reason says which stop string was met."),
    "spaces_between_special_tokens": (True, "Text is what the tokenizer makes of its tokens."),
    "return_tokens_as_token_ids": (False, "The bytes of logprobs say what a token is."),
    "return_token_ids": (False, "Ask Triton's own endpoint (return_output_ids)."),
    "allowed_token_ids": (None, "Use logit_bias or a guide."),
    "guided_whitespace_pattern": (None, "There is one: a few spaces and line ends."),
    "thinking_token_budget": (None, "Use max_tokens."),
}
"""What other servers do and this one does not: the value that asks for nothing, and what to do instead."""


def _few_biases(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise ValueError(f"expected at most {MAX_BIASES} token ids")
    return given


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class StructuredOutputs(BaseModel):
    """vLLM's name for what an answer is held to: one of these."""

    model_config = ConfigDict(extra="forbid")
    json_: Any = Field(None, alias="json")
    regex: str | None = None
    choice: List[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Request(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="allow", strict=False)
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    n: int | None = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    temperature: Finite | None = Field(None, ge=0, le=2e3)
    top_p: Finite | None = Field(None, gt=0, le=1)
    presence_penalty: Finite | None = Field(None, ge=-100, le=100)
    frequency_penalty: Finite | None = Field(None, ge=-100, le=100)
    logit_bias: Annotated[dict[str, Finite], BeforeValidator(_few_biases)] | None = None
    stop: str | List[str] | None = None
    # As vLLM takes them.
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: Finite | None = Field(None, ge=0, le=1)
    repetition_penalty: Finite | None = Field(None, gt=0, le=1e6)
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    ignore_eos: bool = False
    skip_special_tokens: bool | None = None
    stop_token_ids: List[int] | None = None
    bad_words: List[str] | None = None
    add_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: List[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None

    def stops(self) -> list[str]:
        """The stop strings."""
        found = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(found) > MAX_STOP:
            raise ApiError(f"stop: expected at most {MAX_STOP} texts, found {len(found)}.", param="stop")
        if not all(found):
            raise ApiError("stop: expected texts that are not empty.", param="stop")
        return found


class CompletionRequest(Request):
    """POST /v1/completions."""

    max_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    prompt: str | List[str] | List[int] | List[List[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: List[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: List[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    documents: List[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


def parse(data: bytes) -> Any:
    """JSON, of numbers that JSON has, and of bounded depth. Raises ApiError."""
    try:
        found = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"The body: expected JSON ({error})."[:200]) from None
    level: list[Any] = [found]
    values = 0
    for _ in range(MAX_DEPTH):
        level = [each for value in level if isinstance(value, list | dict) for each in _members(value)]
        values += len(level)
        if values > MAX_VALUES:
            raise ApiError(f"The body: expected at most {MAX_VALUES} values.", status=413)
        if not level:
            return found
    raise ApiError(f"The body: expected at most {MAX_DEPTH} levels of lists and objects.")


def _members(value: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read(kind: type[Request], body: object) -> Any:
    """The request that a JSON value is. Raises ApiError, by the field's name."""
    if not isinstance(body, Mapping):
        raise ApiError(f"The body: expected a JSON object, found {type(body).__name__}.")
    try:
        found = kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"][:1]) or None
        raise ApiError(f"{param or 'The request'}: {first['msg']}"[:500], param=param) from None
    if found.best_of is not None and found.best_of != (found.n or 1):
        raise ApiError("best_of: expected n, or nothing. Ask for n answers, and choose from them.", param="best_of")
    for name, value in (found.model_extra or {}).items():
        neutral, instead = REFUSED.get(name, (None, "It is not known here."))
        if name not in IGNORED and value is not None and value != neutral:
            raise ApiError(f"{name}: not supported. {instead}"[:300], param=name[:100])
    return found
