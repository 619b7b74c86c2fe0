"""Log-probabilities as the completions endpoint writes them: four lists that belong together."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triton_repo.openai.generation import Piece
from triton_repo.openai.models import Model

LEAST = -9999.0
"""What stands for minus infinity, which JSON has not."""
Row = Sequence[tuple[int, float]]


class Probabilities:
    """Those of one choice, piece by piece. offset: characters of the choice's text that come before."""

    def __init__(self, model: Model, *, offset: int = 0, skip_special_tokens: bool = True) -> None:
        self._model, self._offset, self._skip = model, offset, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """The lists of the tokens in these pieces; None where there are none."""
        tokens: list[int] = []
        values: list[float | None] = []
        rows: list[Row | None] = []
        for piece in pieces:
            tokens += piece.tokens
            values += piece.log_probs
            rows += piece.top or [()] * len(piece.tokens)
        return self._lists(tokens, values, rows) if tokens else None

    def of_prompt(self, tokens: Sequence[int], logits: NDArray[np.float32], count: int) -> dict[str, Any]:
        """The lists of a prompt. logits: [T, V], each row of what comes after its token; nothing has foretold the first."""
        values: list[float | None] = [None]
        rows: list[Row | None] = [None]
        for token, row in zip(tokens[1:], logits, strict=False):
            numbers = row.astype(np.float64)
            numbers -= numbers.max()
            numbers -= np.log(np.exp(numbers).sum())
            values.append(float(numbers[token]))
            best = np.argsort(-numbers, kind="stable")[:count]
            rows.append([(int(other), float(numbers[other])) for other in best])
        return self._lists(tokens, values, rows)

    def _lists(self, tokens: Sequence[int], values: Sequence[float | None], rows: Sequence[Row | None]) -> dict[str, Any]:
        top: list[dict[str, float] | None] = []
        for token, value, row in zip(tokens, values, rows, strict=True):
            if value is None or row is None:
                top.append(None)
                continue
            found = {self._spelled(other): max(number, LEAST) for other, number in row}
            top.append(found | {self._spelled(token): max(value, LEAST)})  # the chosen one is always there, as OpenAI has it
        return {
            "tokens": [self._spelled(token) for token in tokens],
            "token_logprobs": [None if value is None else max(value, LEAST) for value in values],
            "top_logprobs": top,
            "text_offset": [self._place(token) for token in tokens],
        }

    def _place(self, token: int) -> int:
        """Where in the text the token begins; one that is a part of a character, where that begins."""
        place = self._offset
        if not (self._skip and self._model.tokenizer.is_silent(token)):
            self._offset += len(self._decoder.decode(self._model.token_bytes(token)))
        return place

    def _spelled(self, token: int) -> str:
        """A token's text; the bytes of one that is a part of a character, as OpenAI writes them."""
        data = self._model.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
