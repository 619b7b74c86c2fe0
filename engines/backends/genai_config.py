"""genai_config.json: what onnxruntime-genai needs beside the graph to run it."""

from typing import Any

from engines.target import Target
from ngpt.spec import NGPTSpec


def genai_config(spec: NGPTSpec, target: Target, cache_channels: int) -> dict[str, Any]:
    """The configuration, with model type "decoder" because onnxruntime-genai knows no "ngpt"; a cached head has
    `cache_channels`."""
    cuda = target.providers[0] == "CUDAExecutionProvider"
    eos = list(spec.eos_token_ids)
    pad = spec.pad_token_id if spec.pad_token_id is not None else (eos[0] if eos else 0)
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": spec.bos_token_id if spec.bos_token_id is not None else pad,
            "eos_token_id": eos or pad,
            "pad_token_id": pad,
            "context_length": spec.max_length,
            "vocab_size": spec.vocab_size,
            "decoder": {
                "session_options": {"log_id": "ngpt", "provider_options": [{"cuda": {}}] if cuda else []},
                "filename": "model.onnx",
                "head_size": cache_channels,
                "hidden_size": spec.hidden_size,
                "num_attention_heads": spec.num_heads,
                "num_key_value_heads": spec.num_kv_heads,
                "num_hidden_layers": spec.num_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": spec.max_length,
            "past_present_share_buffer": target.cache == "in-place",
            "do_sample": False,
            "num_beams": 1,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
