"""Every spelling of the position code that a config.json may have, through the configuration class of TensorRT-LLM's PyTorch flow.

With transformers 5 in the environment, a double stands for the base class of transformers 4, which TensorRT-LLM 1.2 and 1.3 pin;
`make matrix-newest` runs this file with the real 4.57.1.
"""

import importlib
import json

import pytest
import transformers

from ngpt.spec import NGPTSpec
from tests.doubles import trtllm_torch
from tests.ngpt.making import GOLDEN

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
SPELLINGS = {
    "nothing": {},
    "null": {"rope_parameters": None, "rope_scaling": None},
    "theta on top": {"rope_theta": 5e5, "rope_scaling": None},
    "theta in parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "both, and equal": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "part on top": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "part in parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "part of all channels": {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}, "partial_rotary_factor": 1.0},
    "llama3 in parameters": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "llama3 in scaling": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "linear, old name": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}},
}
STATED = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


class Base:
    """TEST DOUBLE of PretrainedConfig of transformers 4."""

    def __init__(self, tie_word_embeddings=True, **keys):
        vars(self).update(keys, tie_word_embeddings=tie_word_embeddings, transformers_version="4.57.1", return_dict=True)


REAL = int(transformers.__version__.split(".")[0]) < 5
BASE = transformers.PretrainedConfig if REAL else Base


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_means_what_the_file_says(spelling):
    text = json.loads((GOLDEN / "gqa" / "config.json").read_text())
    text = {key: value for key, value in text.items() if key not in STATED} | SPELLINGS[spelling]
    with trtllm_torch.installed():
        module = importlib.import_module("export.trtllm.modeling_ngpt")
        config = module.runtime_config(BASE)(**{key: value for key, value in text.items() if key != "model_type"})
        meant = NGPTSpec.from_config(text)
        assert NGPTSpec.from_config(module.config_dict(config)) == meant
        if REAL:
            again = type(config).from_dict(config.to_dict())
            assert NGPTSpec.from_config(module.config_dict(again)) == meant
