"""config.json beside a graph: what optimum's ORTModelForCausalLM and transformers.js must know before they open it.

Neither tool knows "ngpt", and both take the shape of the first, empty cache from the type they are told. Of the types that
both know, "gemma" is the plain one: optimum 2.1 (optimum-onnx 0.1) takes the number of key heads and head_dim from the file
for it, where for "llama" it divides hidden_size by the heads, and for an unknown type takes the query heads for key heads;
transformers.js 4.3 knows no "nemotron", counts positions of "gemma3_text" from 1, and "gpt_oss" stands for sliding windows.
Nothing else of Gemma is used: the graph is the network. There are no PyTorch weights in an engine folder and `architectures`
is absent, so nothing loads it as a Gemma.
"""

from typing import Any

from engines.target import Target
from ngpt.spec import NGPTSpec

MODEL_TYPE = "gemma"
NOTE = "The network is model.onnx, an nGPT. This file is for tools that ask for the graph's sizes by a type they know."


def hub_config(spec: NGPTSpec, target: Target, cache_channels: int, external_data: bool) -> dict[str, Any]:
    """The configuration of a graph whose cached heads have so many channels, its weights in a file of their own or not."""
    eos = list(spec.eos_token_ids)
    return {
        "model_type": MODEL_TYPE,
        "note": NOTE,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": cache_channels,
        "max_position_embeddings": spec.max_length,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": spec.pad_token_id,
        "use_cache": True,
        "dtype": target.precision.arithmetic,
        # Without it the type's own tokenizer could be put in the place of the one in tokenizer.json.
        "tokenizer_class": "PreTrainedTokenizerFast",
        # The one graph's name has no suffix, which transformers.js spells fp32, whatever is inside. Node finds the file of
        # weights by itself; a browser must be told that there is one.
        "transformers.js_config": {"dtype": "fp32", "use_external_data_format": external_data},
    }
