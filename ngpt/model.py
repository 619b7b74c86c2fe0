"""The PyTorch nGPT model in transformers' form: the reference that every engine is compared with.

Written from the paper (arXiv:2410.01131, sections 2.1 to 2.6) and the published checkpoint layout, on its own: it shares
no code with the exporters. Shapes in comments: B batch, T tokens, E hidden, H query heads, K key heads, D head channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .config import NGPTConfig


def _wide(x: Tensor) -> Tensor:
    """Norms, angles and residual updates are computed in float32 at least, whatever the storage type."""
    return x if x.dtype == torch.float64 else x.float()


def unit_norm(x: Tensor, eps: float = 0.0) -> Tensor:
    """x / (||x||_2 + eps) over the last axis, in float32 or wider; a zero row stays zero instead of becoming NaN."""
    x = _wide(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + eps
    return x / length.clamp_min(torch.finfo(x.dtype).tiny)


def hypersphere_update(h: Tensor, x: Tensor, rate: Tensor, eps: float = 0.0) -> Tensor:
    """norm(h + rate * (norm(x) - h)) (paper eq. 10 and 11): [B, T, E] -> [B, T, E] in h's dtype."""
    wide = _wide(h)
    return unit_norm(wide + rate * (unit_norm(x, eps) - wide)).to(h.dtype)


def _scales(size: int, constant: float) -> nn.Linear:
    """A trained scale per channel, stored as [size, 1] like the published checkpoints; all start at `constant`."""
    scales = nn.Linear(1, size, bias=False)
    scales._initial_constant = constant  # type: ignore[assignment]
    return scales


class NGPTRotaryEmbedding(nn.Module):
    """Angles of the position code. forward(x, position_ids [B, T]) -> (cos, sin), each [B, T, channels], float32 or wider."""

    inv_freq: Tensor

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = (config.rope_parameters or {}).get("rope_type", "default")
        build = self.default_frequencies if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, attention_scaling = build(config)
        self.attention_scaling: float = attention_scaling
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def default_frequencies(config: NGPTConfig, device: Any = None, **_: Any) -> tuple[Tensor, float]:
        """theta ** (-2i / R) for the R = int(D * partial_rotary_factor) rotated channels: float32 [R / 2]."""
        parameters = config.rope_parameters or {}
        rotated = int(config.heads[2] * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device=device) / rotated
        return 1.0 / (parameters.get("rope_theta", config.default_theta) ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _wide(x[:0]).dtype
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(device=x.device, dtype=dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class ResearchPositionCode(nn.Module):
    """The research code's position code: a signed swap within pairs and a diagonal; see rotate_research."""

    inv_freq: Tensor

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.heads[2], 2, dtype=torch.float32) / config.heads[2]
        self.register_buffer("inv_freq", 10000.0**-exponents, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _wide(x[:0]).dtype
        angles = position_ids[..., None].to(dtype) * self.inv_freq.to(device=x.device, dtype=dtype)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # sin and cos interleaved: [B, T, D]
        half = table.shape[-1] // 2
        return table[..., half:], table[..., :half]


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, D] by cos, sin [B, T, R]; channels from R on pass through."""
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rotate_research(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """out[2i] = -x[2i+1] * C[p, i]; out[2i+1] = x[2i] * S[p, i], as the research code computes it (not a rotation)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((-odd * cos.unsqueeze(1), even * sin.unsqueeze(1)), dim=-1).flatten(-2)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(scaling * q k^T + mask) v, written out: [B, H, T, D] -> ([B, T, H, D], weights [B, H, T, S])."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = _wide(scores).softmax(dim=-1).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NGPTAttention(nn.Module):
    """Attention between unit-norm queries and keys (paper section 2.3)."""

    def __init__(self, config: NGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, key_heads, self.head_dim = config.heads
        self.num_key_value_groups = heads // key_heads
        self.scaling = math.sqrt(self.head_dim)  # multiplies: the dot product of unit vectors has variance 1/D
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.rotate = rotate_half if config.position_code == "rope" else rotate_research
        queries, keys = heads * self.head_dim, key_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.sqk = _scales(queries, config.initializer_range)
        self.sqk_scale = config.sqk_init_value / config.initializer_range

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, E] -> ([B, T, E], attention weights [B, H, T, S] where the implementation returns them)."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        sqk = _wide(self.sqk(hidden_states.new_ones(1))) * self.sqk_scale
        # The square stands on q alone: with grouped queries several query heads share one key head.
        q = unit_norm(self.rotate(_wide(q), *position_embeddings)) * sqk.square().view(1, -1, 1, self.head_dim)
        k = unit_norm(self.rotate(_wide(k), *position_embeddings))
        q, k = q.to(v.dtype), k.to(v.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class NGPTMLP(nn.Module):
    """relu2(u) without a gate, or u * act(v) with one (paper section 2.4): [B, T, E] -> [B, T, E]."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias) if config.gated_mlp else None
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)
        self.suv = _scales(inner * (2 if config.gated_mlp else 1), config.suv_init_scaling)
        self.suv_scale = config.suv_init_value / config.suv_init_scaling * math.sqrt(hidden)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        suv = self.suv(hidden_states.new_ones(1)) * self.suv_scale
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states) * suv))
        suv_up, suv_gate = suv.chunk(2, dim=-1)
        gate = self.act_fn(self.gate_proj(hidden_states) * suv_gate)
        return self.down_proj(self.up_proj(hidden_states) * suv_up * gate)


class NGPTDecoderLayer(GradientCheckpointingLayer):
    """Two moves along the hypersphere: towards the attention's output, then towards the MLP's."""

    def __init__(self, config: NGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = NGPTAttention(config, layer_idx)
        self.mlp = NGPTMLP(config)
        self.attn_alpha = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp_alpha = nn.Parameter(torch.empty(config.hidden_size))
        self.attn_alpha_scale = config.attn_alpha_init_value / config.initializer_range
        self.mlp_alpha_scale = config.mlp_alpha_init_value / config.initializer_range
        self.mlp_norm_eps = config.mlp_norm_eps

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        h = hidden_states
        x, weights = self.self_attn(h, **kwargs)
        h = hypersphere_update(h, x, (_wide(self.attn_alpha) * self.attn_alpha_scale).abs())
        h = hypersphere_update(h, self.mlp(h), (_wide(self.mlp_alpha) * self.mlp_alpha_scale).abs(), self.mlp_norm_eps)
        return h, weights


class NGPTPreTrainedModel(PreTrainedModel):
    """Shared declarations; a fresh model starts on the hypersphere with its scales at their initial constants."""

    config: NGPTConfig
    config_class = NGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NGPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Steps along the sphere are small: bfloat16 would keep 8 bits of them.
    _keep_in_fp32_modules_strict = ["attn_alpha", "mlp_alpha"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if (constant := getattr(module, "_initial_constant", None)) is not None:
            init.constant_(module.weight, constant)
        elif isinstance(module, nn.Linear | nn.Embedding):
            # Columns of the output projections have unit norm, rows of every other matrix.
            draw = torch.empty_like(module.weight, dtype=torch.float32).normal_(0.0, 1.0)
            axis = 0 if getattr(module, "_unit_columns", False) else 1
            draw = draw / torch.linalg.vector_norm(draw, dim=axis, keepdim=True)
            init.copy_(module.weight, draw.to(module.weight.dtype))
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, NGPTDecoderLayer):
            init.constant_(module.attn_alpha, self.config.initializer_range)
            init.constant_(module.mlp_alpha, self.config.initializer_range)
        elif isinstance(module, NGPTRotaryEmbedding):
            build = module.default_frequencies
            if module.rope_type != "default":
                build = ROPE_INIT_FUNCTIONS[module.rope_type]
            inv_freq, _ = build(module.config)
            init.copy_(module.inv_freq, inv_freq)
            init.copy_(module.original_inv_freq, inv_freq)
        elif isinstance(module, ResearchPositionCode):
            exponents = torch.arange(0, self.config.heads[2], 2, dtype=torch.float32) / self.config.heads[2]
            init.copy_(module.inv_freq, 10000.0**-exponents)


class NGPTModel(NGPTPreTrainedModel):
    """The stack without its head; its last hidden state is unit norm already, so there is no final norm."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([NGPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        layers: Any = self.layers
        for layer in layers:
            layer.self_attn.o_proj._unit_columns = layer.mlp.down_proj._unit_columns = True
        self.rotary_emb = (NGPTRotaryEmbedding if config.position_code == "rope" else ResearchPositionCode)(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """int64 ids [B, T] (or embeddings [B, T, E]) -> last_hidden_state [B, T, E] and what was asked for beside it.

        Positions default to the running count of real tokens, so left-padded batches need no position_ids.
        Raises ValueError when both or neither of input_ids and inputs_embeds are given, or when attention weights are
        asked of an implementation that does not return them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config = self.config
        use_cache = config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = getattr(config, "output_attentions", False)
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions needs attn_implementation='eager'; this model uses {config._attn_implementation!r}"
            )
        if self.training and self.gradient_checkpointing:
            use_cache = False
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            position_ids = self._positions(h, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(h, position_ids)
        hidden_states, attentions = [h], []
        for layer in self.layers[: config.num_hidden_layers]:
            out = layer(
                h,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            # A pipeline-parallel engine's stand-in for a layer of another rank gives back h alone.
            h, weights = out if isinstance(out, tuple) else (out, None)
            if output_hidden_states:
                hidden_states.append(h)
            if output_attentions:
                attentions.append(weights)
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    @staticmethod
    def _positions(h: Tensor, attention_mask: Tensor | None, past: Cache | None) -> Tensor:
        tokens, seen = h.shape[1], past.get_seq_length() if past is not None else 0
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] >= tokens:
            real = attention_mask.long()
            counted = (real.cumsum(-1) - 1).masked_fill(real == 0, 1)
            if isinstance(seen, int) and attention_mask.shape[1] == seen + tokens:
                return counted[:, -tokens:]
        return (torch.arange(tokens, device=h.device) + seen).unsqueeze(0)


class NGPTForCausalLM(NGPTPreTrainedModel, GenerationMixin):
    """nGPT with its language-model head: logits = lm_head(h) * sz * sz_init_value / r (paper section 2.1).

    With config.sz_folded the rows of lm_head hold that factor and there is no sz, for engines that apply lm_head themselves.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__(config)
        self.model = NGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.sz = None if config.sz_folded else _scales(config.vocab_size, config.initializer_range)
        self.sz_scale = config.sz_init_value / config.initializer_range
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """ids [B, T] -> logits [B, T, V] (the last `logits_to_keep` of them if positive) and the loss against `labels`."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        h = outputs.last_hidden_state
        h = h if isinstance(keep, slice) and logits_to_keep == 0 else h[:, keep, :]
        logits = self.lm_head(h)
        if self.sz is not None:
            logits = logits * (self.sz(h.new_ones(1)) * self.sz_scale)
        loss = None
        if labels is not None:
            extra = {} if num_items is None else {"num_items_in_batch": num_items}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **extra)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
