"""The keys of an nGPT ``config.json``: those that describe the network, and those that tools leave there and that change nothing.

A key that is in none of these tables may be anything, a change of the network included, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ngpt.checks import is_one, whole
from ngpt.errors import ConfigError, shown
from ngpt.rope import tidy_rope

# The 8B model's values: what an absent key means.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "relu2",
    "max_position_embeddings": 8192,
    "initializer_range": 0.014,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "use_cache": True,
    "sqk_init_value": 1.0,
    "attn_alpha_init_value": 0.05,
    "suv_init_value": 1.0,
    "suv_init_scaling": 1.0,
    "mlp_alpha_init_value": 0.05,
    "sz_init_value": 1.0,
    "position_code": "rope",
    "gated_mlp": False,
    "mlp_norm_eps": 1e-6,
    "sz_folded": False,
}

# Keys that transformers writes into any config and that say nothing about the network.
_BOOKKEEPING = """
    model_type architectures auto_map _name_or_path _commit_hash transformers_version torch_dtype dtype
    use_bfloat16 torchscript return_dict output_hidden_states output_attentions is_encoder_decoder is_decoder
    add_cross_attention cross_attention_hidden_size tie_encoder_decoder tokenizer_class prefix finetuning_task
    task_specific_params problem_type id2label label2id num_labels chunk_size_feed_forward pruned_heads
    sep_token_id decoder_start_token_id max_length min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens tf_legacy_loss
"""
BOOKKEEPING_KEYS = frozenset(_BOOKKEEPING.split())

_DTYPE_KEYS = ("dtype", "torch_dtype")
_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
TOKEN_KEYS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
_SIZES = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    max_position_embeddings
"""
WHOLE_KEYS = TOKEN_KEYS | frozenset(_SIZES.split())

# Keys of other tools and other models that nothing in an nGPT network reads, whatever they say.
_FOREIGN = """
    unsloth_fixed unsloth_version transformers.js_config keys_to_ignore_at_inference pretraining_tp
    attn_implementation _attn_implementation _attn_implementation_autoset experts_implementation use_return_dict
    rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon layernorm_epsilon
    _attn_implementation_internal _experts_implementation_internal _flash_attn_2_enabled use_flash_attn
    _use_flash_attention_2 attention_implementation use_flash_attention use_sdpa gradient_checkpointing
    _gradient_checkpointing hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop attn_pdrop dropout
    residual_dropout embedding_dropout resid_dropout embd_dropout mlp_dropout classifier_dropout
    max_window_layers cache_implementation cache_config chat_template bos_token eos_token pad_token unk_token
    unk_token_id trust_remote_code use_liger_kernel model_max_length name_or_path license base_model
    base_model_name_or_path generation_config device_map output_logits loss_type ignore_keys_at_rope_validation
    initializer_cutoff_factor max_new_tokens min_p renormalize_logits encoder_repetition_penalty
"""
FOREIGN_KEYS = frozenset(_FOREIGN.split())


def _is(value: object) -> Callable[[object], bool]:
    return lambda found: type(found) is type(value) and found == value


def _full_attention(found: object) -> bool:
    return isinstance(found, list) and all(kind == "full_attention" for kind in found)


# Keys of other models that change nothing only while they say so: what they must say, and whether a value does.
NEUTRAL_KEYS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "use_sliding_window": ("false: attention is over all tokens here", _is(False)),
    "sliding_window": ("null: attention is over all tokens here", _is(False)),
    "attention_chunk_size": ("null: attention is over all tokens here", _is(False)),
    "layer_types": ('"full_attention" for every layer', _full_attention),
    "rope_interleaved": ("false: the two halves of a head are rotated", _is(False)),
    "use_mrope": ("false: positions are one number here", _is(False)),
    "is_causal": ("true: a token sees only those before it", _is(True)),
    "use_causal_mask": ("true: a token sees only those before it", _is(True)),
    "use_qkv_bias": ("false: attention_bias says it here", _is(False)),
    "logit_scale": ("1: sz scales the logits here", is_one),
    "logits_scaling": ("1: sz scales the logits here", is_one),
    "embedding_multiplier": ("1: embeddings are used as they are", is_one),
    "output_router_logits": ("false: there are no experts", _is(False)),
    "no_rope_layers": ("an empty list: every layer has its positions", lambda found: found == []),
}


def tidy(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the config in plain terms, what was passed over, one sentence each).

    Foreign keys are left out: those known to change nothing, and any that are null. Whole numbers written as ``128.0`` become
    128, a token id of -1, which no token has, becomes null, and rope blocks are tidied. Raises `ConfigError` naming a key that
    is unknown or that would change the network.
    """
    kept: dict[str, Any] = {}
    ignored: list[str] = []
    notes: list[str] = []
    for key, value in config.items():
        if key in DEFAULTS or key in BOOKKEEPING_KEYS:
            kept[key] = value
        else:
            _check_foreign(key, value, config)
            if key != "quantization_config":
                ignored.append(key)
    for key in WHOLE_KEYS & set(kept):
        value = kept[key]
        kept[key] = [whole(each) for each in value] if isinstance(value, list | tuple) else whole(value)
    for key in TOKEN_KEYS & set(kept):
        if kept[key] == -1:
            kept[key] = None
            notes.append(f"{key} -1 means that there is none")
    for key in _DTYPE_KEYS:
        if kept.get(key) is None:
            continue
        name = str(kept.pop(key)).removeprefix("torch.")  # the weights have dtypes of their own; "auto" means those
        if name in _DTYPES:
            kept[key] = name
        else:
            ignored.append(key)
    for block in ("rope_scaling", "rope_parameters"):
        if isinstance(kept.get(block), Mapping):
            kept[block], foreign = tidy_rope(kept[block])
            ignored += [f"{block}.{key}" for key in foreign]
    if ignored:
        names = ", ".join(shown(key) for key in ignored[:12]) + (f" and {len(ignored) - 12} more" if ignored[12:] else "")
        notes.insert(0, f"ignored, because nothing in this network reads them: {names}")
    return kept, tuple(f"config.json: {note}" for note in notes)


def _check_foreign(key: str, value: Any, config: Mapping[str, Any]) -> None:
    if value is None or key in FOREIGN_KEYS:
        return
    if key == "sliding_window" and config.get("use_sliding_window") is False:
        return  # as Qwen's configs say it
    expected, neutral = NEUTRAL_KEYS.get(key, ("keys of the nGPT configuration, or ones known to change nothing", None))
    if neutral is not None and neutral(value):
        return
    raise ConfigError(
        f"config.json has {'the' if neutral else 'an unknown'} key {shown(key)}",
        expected=expected,
        found=f"{shown(key)}: {shown(value)}",
        remedy="remove the key if it has no effect; if it has, this network is not the nGPT known here",
    )
