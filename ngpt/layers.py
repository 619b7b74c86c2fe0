"""The parts of the PyTorch nGPT model: norms, position codes, attention, MLP, decoder layer.

Written from the paper (arXiv:2410.01131, sections 2.1 to 2.6) and the published checkpoint layout, on its own: it shares
no code with the exporters. Shapes in comments: B batch, T tokens, E hidden, H query heads, K key heads, D head channels.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .config import NGPTConfig

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""transformers' own name of the cache: 5.24 renamed it. Every forward here takes both; calls into the library use this."""


def wide(x: Tensor) -> Tensor:
    """Norms, angles and residual updates are computed in float32 at least, whatever the storage type."""
    return x if x.dtype == torch.float64 else x.float()


def unit_norm(x: Tensor, eps: float = 0.0) -> Tensor:
    """x / (||x||_2 + eps) over the last axis, in float32 or wider; a zero row stays zero instead of becoming NaN."""
    x = wide(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + eps
    return x / length.clamp_min(torch.finfo(x.dtype).tiny)


def hypersphere_update(h: Tensor, x: Tensor, rate: Tensor, eps: float = 0.0) -> Tensor:
    """norm(h + rate * (norm(x) - h)) (paper eq. 10 and 11): [B, T, E] -> [B, T, E] in h's dtype."""
    base = wide(h)
    return unit_norm(base + rate * (unit_norm(x, eps) - base)).to(h.dtype)


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache under whichever of its two names it was given. Raises ValueError for two different ones."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("give one of past_key_values and cache: they are two names of the same argument")
    return cache if past_key_values is None else past_key_values


def scales(size: int, constant: float) -> nn.Linear:
    """A trained scale per channel, stored as [size, 1] like the published checkpoints; all start at `constant`."""
    linear = nn.Linear(1, size, bias=False)
    linear._initial_constant = constant  # type: ignore[assignment]
    return linear


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
        dtype = wide(x[:0]).dtype
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
        dtype = wide(x[:0]).dtype
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
    weights = wide(scores).softmax(dim=-1).to(query.dtype)
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
        self.sqk = scales(queries, config.initializer_range)
        self.sqk_scale = config.sqk_init_value / config.initializer_range

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, E] -> ([B, T, E], attention weights [B, H, T, S] where the implementation returns them)."""
        q, k, v = self.queries_keys_values(hidden_states, position_embeddings)
        if (past := one_cache(past_key_values, cache)) is not None:
            k, v = past.update(k, v, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def queries_keys_values(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, E] -> q [B, H, T, D] and k [B, K, T, D], rotated, of unit norm, q times sqk**2; v [B, K, T, D]."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        sqk = wide(self.sqk(hidden_states.new_ones(1))) * self.sqk_scale
        # The square stands on q alone: with grouped queries several query heads share one key head.
        q = unit_norm(self.rotate(wide(q), *position_embeddings)) * sqk.square().view(1, -1, 1, self.head_dim)
        k = unit_norm(self.rotate(wide(k), *position_embeddings))
        return q.to(v.dtype), k.to(v.dtype), v


class NGPTMLP(nn.Module):
    """relu2(u) without a gate, or u * act(v) with one (paper section 2.4): [B, T, E] -> [B, T, E]."""

    def __init__(self, config: NGPTConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias) if config.gated_mlp else None
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)
        self.suv = scales(inner * (2 if config.gated_mlp else 1), config.suv_init_scaling)
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

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        h = hidden_states
        x, _ = self.self_attn(h, **kwargs)
        h = hypersphere_update(h, x, (wide(self.attn_alpha) * self.attn_alpha_scale).abs())
        return hypersphere_update(h, self.mlp(h), (wide(self.mlp_alpha) * self.mlp_alpha_scale).abs(), self.mlp_norm_eps)
