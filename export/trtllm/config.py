"""config.json of a TensorRT-LLM checkpoint, and back.

Keys of `PretrainedConfig.__init__` (tensorrt_llm/models/modeling_utils.py), read at commit 34a26727 of
anish-shanbhag/TensorRT-LLM, a fork made while 1.2 was current, the nearest stored to tag v1.2.1.
"""

from __future__ import annotations

from typing import Any

from export.precision import Precision
from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt.errors import UnsupportedError
from ngpt.spec import NGPTSpec

ARCHITECTURE = "NGPTForCausalLM"
QUANTISATION = {"int8": "W8A16", "int4": "W4A16", "float8_e4m3": "FP8"}
"""Weight-only int8 and int4 are quantised by TensorRT-LLM's own loader from plain weights (`preprocess_weights`, which calls
`torch.ops.trtllm.symmetric_quantize_last_axis_of_batched_matrix` and interleaves), so their checkpoint holds plain weights."""
KV_CACHE = {"float8_e4m3": "FP8"}
ACTIVATIONS = ("relu2", "relu", "silu", "gelu_tanh")
"""`tensorrt_llm.functional` has no erf: its gelu is the tanh approximation."""


def trtllm_config(
    weights: DeployedWeights, parallel: Parallel, precision: Precision, kernels: int | None = None
) -> dict[str, Any]:
    """The dict of config.json.

    `kernels`: the compute capability (90 is 9.0) to use this project's plugins for, None for none. A cache of float8 makes
    `PretrainedConfig.kv_dtype` "fp8". Raises UnsupportedError for an activation that TensorRT-LLM lacks.
    """
    spec = weights.spec
    if spec.mlp not in ACTIVATIONS:
        raise UnsupportedError(
            "hidden_act in TensorRT-LLM", expected=", ".join(ACTIVATIONS), found=spec.mlp, remedy="use a TensorRT target"
        )
    return {
        "architecture": ARCHITECTURE,
        "dtype": precision.arithmetic,
        "logits_dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_size": spec.head_dim,
        "hidden_act": spec.mlp,
        "max_position_embeddings": spec.max_length,
        # Positions are encoded before the attention operation, which must add none of its own.
        "position_embedding_type": "learned_absolute",
        "rotary_embedding_dim": 0,
        "use_parallel_embedding": parallel.tp > 1,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": parallel.world, "tp_size": parallel.tp, "pp_size": parallel.pp},
        "quantization": {
            "quant_algo": QUANTISATION.get(precision.projections.code),
            "kv_cache_quant_algo": KV_CACHE.get(precision.cache),
        },
        "ngpt": {"spec": spec.to_dict(), "mlp_eps": weights.mlp_eps, "kernels": kernels},
    }


def spec_from(ngpt: dict[str, Any]) -> NGPTSpec:
    """The spec of a config's `ngpt` table.

    Raises ConfigError when it is inconsistent, TypeError for other fields than NGPTSpec's.
    """
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in ngpt["spec"].items()}
    return NGPTSpec(**fields)
