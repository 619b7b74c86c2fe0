"""NGPTConfig: the configuration of an nGPT checkpoint, as transformers 5 reads and writes it.

Source of the keys and defaults: the configuration published with nvidia/Normalized-Nemotron-8B-Reasoning. The last four
keys are this project's: three carry the paper's research variant (arXiv:2410.01131, repository NVIDIA/ngpt) in the same form,
`sz_folded` says that the vocabulary's scales are in lm_head's rows already.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

POSITION_CODES = ("rope", "research")
_WHOLE = (int, int | None, int | list[int] | None)
_DTYPES = ("float64", "float32", "float16", "bfloat16")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@strict
class NGPTConfig(PreTrainedConfig):
    """The configuration of an nGPT model: everything that shapes the network.

    The defaults are those of the 8B model nvidia/Normalized-Nemotron-8B-Reasoning. In the formulas, which are those of the paper
    (arXiv:2410.01131), r is ``initializer_range``, h a hidden state, and norm(x) is x / ||x||. sqk, alpha, suv and sz are
    trained scales.

    Args:
        vocab_size (`int`, *optional*, defaults to 131072):
            Number of token ids: rows of the embedding table and of the head.
        hidden_size (`int`, *optional*, defaults to 4096):
            Size E of the hidden states, which have unit norm.
        intermediate_size (`int`, *optional*, defaults to 21504):
            Size F of the MLP's inner layer.
        num_hidden_layers (`int`, *optional*, defaults to 32):
            Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 32):
            Number H of query heads.
        num_key_value_heads (`int`, *optional*, defaults to 8):
            Number K of key and value heads; it divides ``num_attention_heads``. None means as many as query heads.
        head_dim (`int`, *optional*, defaults to 128):
            Channels D of one head, an even number. None means ``hidden_size // num_attention_heads``.
        hidden_act (`str`, *optional*, defaults to `"relu2"`):
            Activation of the MLP, by transformers' name: relu(x)**2 unless given.
        max_position_embeddings (`int`, *optional*, defaults to 8192):
            Largest number of tokens in a sequence.
        initializer_range (`float`, *optional*, defaults to 0.014):
            Called r in the formulas. It is part of the forward pass: the stored sqk, alpha and sz are multiplied by their
            init value over r. It must not be 0.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns its keys and values for the next call.
        pad_token_id (`int`, *optional*):
            Id of the padding token, if there is one.
        bos_token_id (`int`, *optional*, defaults to 1):
            Id of the token that begins a text.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 2):
            Id of the token that ends a text, or several.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the head uses the embedding table as its weights.
        rope_parameters (`dict`, *optional*):
            The rotary position code, as transformers 5 writes it: ``rope_type`` (default, linear, dynamic, yarn, longrope or
            llama3), ``rope_theta`` (1,000,000 unless given), ``partial_rotary_factor`` (the share of each head's channels
            that is rotated) and what the type needs. The older ``rope_theta``, ``rope_scaling`` and
            ``partial_rotary_factor`` are accepted as well.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the four projections of attention have biases.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention probabilities, in training only.
        mlp_bias (`bool`, *optional*, defaults to `False`):
            Whether the projections of the MLP have biases.
        sqk_init_value (`float`, *optional*, defaults to 1.0):
            Init value of sqk: q = norm(q) * (sqk * sqk_init_value / r)**2.
        attn_alpha_init_value (`float`, *optional*, defaults to 0.05):
            Init value of attention's alpha. The step of the update is abs(alpha * attn_alpha_init_value / r).
        mlp_alpha_init_value (`float`, *optional*, defaults to 0.05):
            Init value of the MLP's alpha. The step of the update is abs(alpha * mlp_alpha_init_value / r).
        suv_init_value (`float`, *optional*, defaults to 1.0):
            Init value of suv: u = up_proj(h) * suv * (suv_init_value / suv_init_scaling) * sqrt(E).
        suv_init_scaling (`float`, *optional*, defaults to 1.0):
            Scaling of suv, which takes the place of r in its formula. It must not be 0.
        sz_init_value (`float`, *optional*, defaults to 1.0):
            Init value of sz: logits = lm_head(h) * sz * sz_init_value / r.
        position_code (`str`, *optional*, defaults to `"rope"`):
            "rope", or "research": the position code of the research code (repository NVIDIA/ngpt), which is no rotation.
        gated_mlp (`bool`, *optional*, defaults to `False`):
            Whether the MLP is gated, as in the research code: a projection ``gate_proj`` more, and u * act(v) in the place
            of act(u), where v is to ``gate_proj`` what u is to ``up_proj``. suv then has one scale for each channel of both.
        mlp_norm_eps (`float`, *optional*, defaults to 1e-6):
            Added to the length in the norm of the MLP's output: x / (||x|| + eps). The other norms have eps 0.
        sz_folded (`bool`, *optional*, defaults to `False`):
            Whether the rows of ``lm_head`` hold sz * sz_init_value / r already; there is no sz then.
            Written by ``ngpt-deploy convert --fold-scales``.
        **kwargs:
            Arguments that every `PreTrainedConfig` of transformers has.

    Raises:
        ValueError: values contradict one another; the text names the key.

    Example::

        from ngpt import NGPTConfig, NGPTForCausalLM

        config = NGPTConfig(vocab_size=1000, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        model = NGPTForCausalLM(config)
    """

    model_type = "ngpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 1_000_000.0
    # sqk and suv are Linear(1, n), so that "colwise" shards them along with the projection whose channels they scale.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.sqk": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.suv": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    }

    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 21504
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    hidden_act: str = "relu2"
    max_position_embeddings: int = 8192
    initializer_range: int | float = 0.014
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    sqk_init_value: int | float = 1.0
    attn_alpha_init_value: int | float = 0.05
    mlp_alpha_init_value: int | float = 0.05
    suv_init_value: int | float = 1.0
    suv_init_scaling: int | float = 1.0
    sz_init_value: int | float = 1.0
    position_code: str = "rope"
    gated_mlp: bool = False
    mlp_norm_eps: int | float = 1e-6
    sz_folded: bool = False

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "NGPTConfig":
        """As transformers' own, from what other tools write too: 128.0 for 128, -1 for no token, an older name of a rope type."""
        plain = {key: _plain(key, value) for key, value in config_dict.items() if key != "use_return_dict"}
        if plain.get("use_sliding_window") is False:
            plain.pop("sliding_window", None)  # transformers' caches would read it all the same
        return super().from_dict(plain, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key heads, channels per head), once the two that may be null have been filled in."""
        assert self.num_key_value_heads is not None and self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    def validate_architecture(self) -> None:
        """Refuse values that contradict one another; called by transformers when a config is made."""
        heads, keys, channels = self.heads
        if heads % keys:
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({keys})")
        if channels % 2:
            raise ValueError(f"head_dim must be even for a rotary position code, found {channels}")
        if self.initializer_range == 0 or self.suv_init_scaling == 0:
            raise ValueError("initializer_range and suv_init_scaling divide in the forward and must not be 0")
        if self.position_code not in POSITION_CODES:
            raise ValueError(f"position_code must be one of {POSITION_CODES}, found {self.position_code!r}")
        if self.sz_folded and self.tie_word_embeddings:
            raise ValueError("sz_folded needs a head of its own: tie_word_embeddings must be false")
        if getattr(self, "sliding_window", None):
            raise ValueError(f"sliding_window must be null: attention is over all tokens, found {self.sliding_window!r}")
        kinds = getattr(self, "layer_types", None) or ()
        if any(kind != "full_attention" for kind in kinds):
            raise ValueError(f"layer_types must all be 'full_attention', found {sorted(set(map(str, kinds)))!r}")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {ROPE_TYPES}, found {rope_type!r}")


def _plain(key: str, value: Any) -> Any:
    """One value of a config.json, without the habits of other tools."""
    if NGPTConfig.__annotations__.get(key) in _WHOLE:
        value = [_whole(each) for each in value] if isinstance(value, list) else _whole(value)
    if key in ("bos_token_id", "eos_token_id", "pad_token_id") and value == -1:
        return None
    if key in ("dtype", "torch_dtype") and isinstance(value, str):
        value = value.removeprefix("torch.")
        return value if value in _DTYPES else None  # "auto": that of the weights
    if key not in ("rope_scaling", "rope_parameters") or not isinstance(value, dict):
        return value
    kept = {
        name: each
        for name, each in value.items()
        if each is not None and name != "finetuned" and (name not in ("attn_factor", "extrapolation_factor") or each != 1)
    }
    return kept | {name: "longrope" for name in ("type", "rope_type") if kept.get(name) == "su"}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
