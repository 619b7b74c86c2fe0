"""One answer of a served model: from a request to tensors, and from responses to pieces."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triton_repo.async_client import AsyncClient, Refused
from triton_repo.openai.errors import ApiError, from_server
from triton_repo.openai.models import Model
from triton_repo.openai.requests import MAX_BIASES, Request
from triton_repo.serving_inputs import sequences_array


@dataclass(frozen=True)
class Piece:
    """Text, and the tokens that came with it. The last piece has a finish_reason and the counts."""

    text: str
    tokens: Sequence[int] = ()
    log_probs: Sequence[float] = ()
    top: Sequence[Sequence[tuple[int, float]]] = ()
    finish_reason: str | None = None
    stop_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    context: NDArray[np.float32] | None = None
    """Logits [T, V] of the prompt, where they are asked for."""

    def without_token(self) -> Piece:
        """The same, of an answer whose only token was not asked for."""
        ended = self.finish_reason and "length"
        return Piece("", finish_reason=ended, prompt_tokens=self.prompt_tokens, context=self.context)


@dataclass(frozen=True)
class Ask:
    """What one answer needs beyond the request's own fields. prompt: text, or token ids. logprobs: None, or how many
    alternatives beside each token. context: whether the prompt's logits are wanted."""

    prompt: str | Sequence[int]
    max_tokens: int | None
    special_tokens: bool = True
    skip_special_tokens: bool = True
    logprobs: int | None = None
    context: bool = False
    guide: tuple[str, str] | None = None
    stop: Sequence[str] = field(default_factory=tuple)
    choice: int = 0


def tensors(request: Request, ask: Ask, model: Model) -> dict[str, NDArray[Any]]:
    """The request to the served model. Raises ApiError."""
    given: dict[str, Any] = {"stream": True, "exclude_input_in_output": True, "return_finish_reason": True}
    given |= {"return_num_input_tokens": True, "return_num_output_tokens": True}
    given["skip_special_tokens"] = ask.skip_special_tokens
    given |= sampling(request, model.generation)
    if request.seed is not None:
        given["seed"] = (request.seed + ask.choice) % (1 << 64)
    for name in ("presence_penalty", "frequency_penalty", "min_tokens"):
        if (value := getattr(request, name)) is not None:
            given[name] = value
    if request.ignore_eos:
        given["ignore_eos"] = True
    if ask.max_tokens is not None:
        given["max_tokens"] = ask.max_tokens
    if ask.logprobs is not None:
        given |= {"return_log_probs": True, "return_output_ids": True, "top_logprobs": ask.logprobs}
    if ask.context:
        given["return_context_logits"] = True
    arrays = {name: np.asarray([[value]], _dtype(name, value)) for name, value in given.items()}
    if isinstance(ask.prompt, str):
        arrays["text_input"] = _strings([_utf8("prompt", ask.prompt)])
        arrays["add_special_tokens"] = np.asarray([[ask.special_tokens]])
    else:
        arrays["input_ids"] = np.asarray([_ids("prompt", ask.prompt)], np.int32)
    if stops := [*request.stops(), *ask.stop]:
        arrays["stop_words"] = _strings([_utf8("stop", text) for text in stops])
    if request.bad_words:
        arrays["bad_words"] = _strings([_utf8("bad_words", text) for text in request.bad_words])
    if request.stop_token_ids:
        arrays["stop_words_list"] = sequences_array([[token] for token in _ids("stop_token_ids", request.stop_token_ids)])[None]
    if request.logit_bias:
        arrays |= _bias(request.logit_bias)
    if ask.guide is not None:
        arrays["guided_decoding_guide_type"] = _strings([ask.guide[0].encode()])
        arrays["guided_decoding_guide"] = _strings([_utf8("response_format", ask.guide[1])])
    return arrays


def sampling(request: Request, generation: Mapping[str, float | bool]) -> dict[str, float | int]:
    """How tokens are chosen: as the request says, else as the model's generation_config.json does, else by OpenAI's defaults
    (temperature 1). do_sample is passed over, as in vLLM: transformers writes it as false where nobody has decided it."""
    found: dict[str, float | int] = {}
    temperature = request.temperature if request.temperature is not None else generation.get("temperature", 1.0)
    found["temperature"] = float(temperature)
    for name in ("top_p", "min_p", "repetition_penalty"):
        value = getattr(request, name)
        value = generation.get(name) if value is None else value
        if value is not None:
            found[name] = float(value)
    top_k = request.top_k if request.top_k is not None else generation.get("top_k")
    if top_k is not None and top_k > 0:  # vLLM says -1 for all, transformers 0
        found["top_k"] = int(top_k)
    return found


async def generate(client: AsyncClient, model: Model, arrays: dict[str, NDArray[Any]]) -> AsyncGenerator[Piece, None]:
    """The pieces of one answer, of which the last has a finish_reason; left early, its request is cancelled.

    Raises ApiError, also for an answer that somebody else has ended.
    """
    ended: str | None = None
    try:
        async with contextlib.aclosing(client.stream(model.served, arrays)) as results:
            async for result in results:
                found = {tensor.name for tensor in result.get_response().outputs}
                last = "finish_reason" in found
                ended = _text(result, "finish_reason") if last else None
                if ended == "cancelled":
                    break
                yield Piece(
                    text=_text(result, "text_output") if "text_output" in found else "",
                    tokens=result.as_numpy("output_ids").reshape(-1).tolist() if "output_ids" in found else (),
                    log_probs=result.as_numpy("output_log_probs").reshape(-1).tolist() if "output_log_probs" in found else (),
                    top=_top(result) if "top_log_probs" in found else (),
                    finish_reason=ended,
                    stop_reason=_text(result, "stop_reason") or None if last else None,
                    prompt_tokens=int(result.as_numpy("num_input_tokens").item()) if "num_input_tokens" in found else 0,
                    completion_tokens=int(result.as_numpy("num_output_tokens").item()) if "num_output_tokens" in found else 0,
                    context=_rows(result, "context_logits") if "context_logits" in found else None,
                )
    except Refused as error:
        raise from_server(error) from error
    if ended not in ("stop", "length"):
        raise ApiError(
            "The answer was ended before it was complete. Send the request again.",
            status=503,
            kind="server_error",
            code="unavailable",
        )


def _text(result: Any, name: str) -> str:
    return b"".join(result.as_numpy(name).reshape(-1).tolist()).decode("utf-8", "replace")


def _rows(result: Any, name: str) -> NDArray[np.float32]:
    array: NDArray[np.float32] = result.as_numpy(name)
    return array.reshape(-1, array.shape[-1])


def _top(result: Any) -> list[list[tuple[int, float]]]:
    ids, values = result.as_numpy("top_log_prob_ids"), result.as_numpy("top_log_probs")
    rows = zip(ids.reshape(-1, ids.shape[-1]).tolist(), values.reshape(-1, values.shape[-1]).tolist(), strict=True)
    return [list(zip(row, numbers, strict=True)) for row, numbers in rows]


_DTYPES: dict[str, Any] = {
    "seed": np.uint64,
    "max_tokens": np.int32,
    "min_tokens": np.int32,
    "top_k": np.int32,
    "top_logprobs": np.int32,
}


def _dtype(name: str, value: object) -> Any:
    return np.bool_ if isinstance(value, bool) else _DTYPES.get(name, np.float32)


def _strings(values: Sequence[bytes]) -> NDArray[Any]:
    return np.asarray([values], dtype=np.object_)


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(f"{name}: expected text that UTF-8 can spell, found half a surrogate pair.", param=name) from None


def _ids(name: str, values: Sequence[int]) -> list[int]:
    if not values or not all(0 <= value < 1 << 31 for value in values):
        raise ApiError(f"{name}: expected token ids of at least 0, at least one.", param=name)
    return list(values)


def _bias(given: Mapping[str, float]) -> dict[str, NDArray[Any]]:
    try:
        ids = [int(token) for token in given]
    except ValueError:
        raise ApiError("logit_bias: expected token ids as keys.", param="logit_bias") from None
    if (
        len(ids) > MAX_BIASES
        or not all(0 <= token < 1 << 31 for token in ids)
        or not all(-100 <= value <= 100 for value in given.values())
    ):
        raise ApiError(f"logit_bias: expected at most {MAX_BIASES} token ids with numbers from -100 to 100.", param="logit_bias")
    return {
        "logit_bias_ids": np.asarray([ids], np.int32),
        "logit_bias_values": np.asarray([list(given.values())], np.float32),
    }
