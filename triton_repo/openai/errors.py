"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import re
from typing import Any

from triton_repo.async_client import Refused

_BUSY = ("queue is full", "maximum queue size", "Exceeds maximum")
_GONE = (
    "was stopped", "engine is closed", "no available versions", "is not healthy", "unloading", "exiting", "not ready",
    "unknown model", "stream ended before", "shutting down",
)  # fmt: skip
"""Triton tells no status on a stream, only words: its own, and those of this project's models."""
_FAILED = ("the model failed",)
_TENSORS = {
    "text_input": "prompt",
    "input_ids": "prompt",
    "guide": "response_format",
    "guided_decoding_guide_type": "response_format",
    "stop_words": "stop",
    "stop_words_list": "stop_token_ids",
    "logit_bias_ids": "logit_bias",
    "logit_bias_values": "logit_bias",
}


class ApiError(Exception):
    """An answer that is an error. status: of HTTP. kind: "invalid_request_error", "server_error", ..."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.retry_after = 1 if status in (429, 503) else None

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def from_server(error: Refused) -> ApiError:
    """What a refusal of Triton's means for a client of this interface."""
    text = str(error)[:1000]
    if any(words in text for words in _BUSY):
        return ApiError(
            "The server is busy: its queue is full. Try again later.", status=503, kind="server_error", code="overloaded"
        )
    if error.status in ("UNAVAILABLE", "CANCELLED", "UNKNOWN", "DEADLINE_EXCEEDED") or any(words in text for words in _GONE):
        return ApiError(
            "The model's server ended, or is not there, before the answer was complete. Send the request again.",
            status=503,
            kind="server_error",
            code="unavailable",
        )
    if error.status in ("INTERNAL", "RESOURCE_EXHAUSTED") or any(words in text for words in _FAILED):
        return ApiError("The model failed. Its server's log says more.", status=500, kind="server_error")
    name = re.match(r"[a-z_]+", text)
    param = None if name is None else _TENSORS.get(name[0], name[0])
    too_long = "prompt is too long" in text or " after a prompt of " in text
    return ApiError(text, param=param, code="context_length_exceeded" if too_long else None)
