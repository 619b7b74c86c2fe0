"""Token ids to text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # what was copied beside this file, before anything that is installed

from engines.runtime.errors import RequestError
from engines.runtime.text import Tokenizer
from triton_repo.copies import check_copies
from triton_repo.serving_inputs import InputError, Inputs, check_ids
from triton_repo.templates.shared.python_backend import bad_request, error_response, inputs_of, parameter


class TritonPythonModel:
    """See the Python backend's documentation for the methods."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        check_copies(HERE, config)
        self.tokenizer = Tokenizer.load(HERE / "tokenizer")
        self.vocab_size = int(parameter(config, "vocab_size"))

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                responses.append(pb_utils.InferenceResponse([self._decode(inputs_of(request))]))
            except (InputError, RequestError) as error:
                responses.append(error_response(bad_request(error)))
        return responses

    def _decode(self, inputs: Inputs) -> Any:
        tokens = inputs["TOKENS_BATCH"]
        rows = tokens.reshape(-1, tokens.shape[-1])
        lengths = inputs["SEQUENCE_LENGTH"].reshape(-1)
        if len(lengths) != len(rows):
            raise InputError(f"SEQUENCE_LENGTH: expected one length for each of {len(rows)} rows, found {len(lengths)}.")
        texts = []
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
            if not 0 <= length <= len(row):
                raise InputError(f"SEQUENCE_LENGTH: expected 0 to {len(row)}, found {length}.")
            ids = check_ids("TOKENS_BATCH", row[:length], self.vocab_size)
            texts.append(self.tokenizer.decode(ids).encode("utf-8"))
        return pb_utils.Tensor("OUTPUT", np.asarray([texts], dtype=np.object_))
