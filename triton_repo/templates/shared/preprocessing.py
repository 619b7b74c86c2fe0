"""Text to token ids."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # what was copied beside this file, before anything that is installed

from engines.runtime.errors import RequestError
from engines.runtime.text import Tokenizer
from triton_repo.copies import check_copies
from triton_repo.serving_inputs import InputError, Inputs, scalar, sequences_array, text_of, words_of
from triton_repo.templates.shared.python_backend import bad_request, error_response, inputs_of, parameter


class TritonPythonModel:
    """See the Python backend's documentation for the methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        check_copies(HERE, config)
        self.tokenizer = Tokenizer.load(HERE / "tokenizer")
        self.special_tokens = parameter(config, "add_special_tokens", "true") == "true"
        self.end_id = int(parameter(config, "end_id", "-1"))
        self.pad_id = int(parameter(config, "pad_id", "-1"))

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                responses.append(pb_utils.InferenceResponse(self._encode(inputs_of(request))))
            except (InputError, RequestError) as error:
                responses.append(error_response(bad_request(error)))
        return responses

    def _encode(self, inputs: Inputs) -> list[Any]:
        ids = self.tokenizer.encode(text_of(inputs, "QUERY"), add_special_tokens=self.special_tokens)
        length = scalar(inputs, "REQUEST_OUTPUT_LEN")
        if length is None or length < 1:
            raise InputError(f"REQUEST_OUTPUT_LEN: expected at least 1, found {length}.")
        end_id, pad_id = scalar(inputs, "END_ID"), scalar(inputs, "PAD_ID")
        values = {
            "INPUT_ID": [ids],
            "REQUEST_INPUT_LEN": [[len(ids)]],
            "BAD_WORDS_IDS": self._words(inputs, "BAD_WORDS_DICT"),
            "STOP_WORDS_IDS": self._words(inputs, "STOP_WORDS_DICT"),
            "REQUEST_OUTPUT_LEN": [[length]],
            "OUT_END_ID": [[self.end_id if end_id is None else end_id]],
            "OUT_PAD_ID": [[self.pad_id if pad_id is None else pad_id]],
        }
        return [pb_utils.Tensor(name, np.asarray(value, np.int32)) for name, value in values.items()]

    def _words(self, inputs: Inputs, name: str) -> NDArray[np.int32]:
        return sequences_array([self.tokenizer.encode(word, add_special_tokens=False) for word in words_of(inputs, name)])[None]
