"""TEST DOUBLE of `gpt_attention`.

Read in tensorrt_llm/functional.py (commit 00714966) and docs/source/advanced/gpt-attention.md (commit 5a211b91).

softmax(q k^T / (q_scaling * sqrt(D)), causal) v in float32 over a paged or a contiguous cache. Packed: context
requests stand before generation requests; a context request brings `context_lengths` tokens, a generation request
one, and after the step its cache holds `sequence_length` keys (cpp/tensorrt_llm/batch_manager/runtimeBuffers.cpp,
`setFromInputs`). Padded: every row brings S tokens, of which the first `context_lengths` are real in context; what
the kernel leaves at the others is undefined, here NaN.

A context request reads the cache with paged context FMHA alone, and else its own unrounded keys and values (input
layouts Q_PAGED_KV and PACKED_QKV; cpp/tensorrt_llm/common/attentionOp.cpp as stored, no commit known). An fp8 cache
holds clamp(x * kv_orig_quant_scale) in e4m3, which generation reads back times kv_quant_orig_scale, the step's own
token included (an assumption: the generation kernels were not read).
"""

import torch

from tests.doubles.tensorrt_llm_double.tensor import made
from tests.doubles.tensorrt_llm_double.world import QuantMode, default_net

CONTEXT, GENERATION = 0, 1
_PLAIN = QuantMode(0)


def gpt_attention(
    *,
    qkv,
    past_key_value,
    sequence_length,
    host_past_key_value_lengths,
    host_max_attention_window_sizes,
    host_sink_token_length,
    context_lengths,
    cache_indirection,
    host_request_types,
    layer_idx,
    num_heads,
    num_kv_heads,
    hidden_size_per_head,
    q_scaling,
    attention_mask=None,
    rotary_embedding_dim=0,
    max_context_length=None,
    tp_size=1,
    tp_rank=0,
    kv_cache_block_offsets=None,
    host_kv_cache_block_offsets=None,
    host_kv_cache_pool_pointers=None,
    host_kv_cache_pool_mapping=None,
    host_context_lengths=None,
    use_cache=True,
    host_runtime_perf_knobs=None,
    host_context_progress=None,
    num_kv_heads_origin=-1,
    kv_orig_quant_scale=None,
    kv_quant_orig_scale=None,
    kv_cache_quant_mode=_PLAIN,
):
    """The arguments that the project passes (the source has 70, with the same names and defaults)."""
    net = default_net()
    config, d = net.plugin_config, hidden_size_per_head
    assert qkv.dtype == config.gpt_attention_plugin, f"qkv is {qkv.dtype}, the plugin {config.gpt_attention_plugin}"
    assert qkv.shape[-1] == (num_heads + 2 * num_kv_heads) * d, (qkv.shape, num_heads, num_kv_heads, d)
    assert isinstance(max_context_length, int) and attention_mask is None and rotary_embedding_dim == 0
    assert (tp_size, tp_rank) == (net.mapping.tp_size, net.mapping.tp_rank)
    for name, value in {
        "sequence_length": sequence_length, "host_past_key_value_lengths": host_past_key_value_lengths,
        "context_lengths": context_lengths, "cache_indirection": cache_indirection, "host_request_types": host_request_types,
        "host_max_attention_window_sizes": host_max_attention_window_sizes, "host_sink_token_length": host_sink_token_length,
        "host_runtime_perf_knobs": host_runtime_perf_knobs, "host_context_progress": host_context_progress,
    }.items():  # fmt: skip
        assert value is not None, f"gpt_attention without {name}"
    packed = config.remove_input_padding
    assert not packed or host_context_lengths is not None
    assert qkv.ndim() == (2 if packed else 3)
    q, k, v = (part.float() for part in torch.split(qkv.data, [num_heads * d, num_kv_heads * d, num_kv_heads * d], -1))
    scales = None
    if kv_cache_quant_mode.has_fp8_kv_cache():
        assert not config.use_paged_context_fmha, "FP8 Paged Context FMHA is disabled because FP8 context FMHA is disabled"
        for scale in (kv_orig_quant_scale, kv_quant_orig_scale):
            assert scale.dtype == "float32" and scale.shape == (1,)
        scales = float(kv_orig_quant_scale.data), float(kv_quant_orig_scale.data)
    if config.paged_kv_cache:
        cache = _Pages(net, layer_idx, kv_cache_block_offsets, host_kv_cache_block_offsets, host_kv_cache_pool_pointers,
                       host_kv_cache_pool_mapping)  # fmt: skip
    else:
        assert use_cache and past_key_value is not None
        cache = _Rows(past_key_value)
    out = torch.full((*qkv.shape[:-1], num_heads * d), float("nan"))
    at = 0
    for row, (kind, total) in enumerate(zip(host_request_types.data.tolist(), sequence_length.data.tolist(), strict=True)):
        new = int(context_lengths.data[row]) if kind == CONTEXT else 1
        where = slice(at, at + new) if packed else (row, slice(0, new))
        at += new
        past = total - new
        # What the C++ runtime sets: the keys after the step for context, before it for generation.
        assert int(host_past_key_value_lengths.data[row]) == (total if kind == CONTEXT else past)
        assert past >= 0
        new_keys, new_values = (x[where].view(new, num_kv_heads, d) for x in (k, v))
        kept = [x if scales is None else (x * scales[0]).clamp(-448, 448) for x in (new_keys, new_values)]
        cache.append(row, past, *kept, qkv.data.dtype if scales is None else torch.float8_e4m3fn)
        if kind == CONTEXT and not config.use_paged_context_fmha:
            assert past == 0, "chunks of a prompt need paged context FMHA"
            keys, values = new_keys, new_values
        else:
            keys, values = (x if scales is None else (x * scales[1]).to(qkv.data.dtype).float() for x in cache.read(row, total))
        out[where] = _attend(q[where].view(new, num_heads, d), keys, values, past, q_scaling).reshape(new, -1)
    assert not packed or at == qkv.shape[0], "tokens that belong to no request"
    return made(out.to(qkv.data.dtype)), None if config.paged_kv_cache else past_key_value


def _attend(q, keys, values, past, q_scaling):
    """q [S, H, D] at positions past.., keys and values [T, K, D] -> [S, H, D]."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
    scores = q.transpose(0, 1) @ keys.mT / (q_scaling * q.shape[-1] ** 0.5)
    later = torch.arange(keys.shape[1])[None, :] > past + torch.arange(len(q))[:, None]
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ values).transpose(0, 1)


class _Rows:
    """Contiguous: [B, 2, K, max_len, D], written in place."""

    def __init__(self, tensor):
        self.data = tensor.data

    def append(self, row, past, k, v, dtype):
        for field, value in enumerate((k, v)):
            self.data[row, field, :, past : past + len(value)] = value.transpose(0, 1).to(dtype)

    def read(self, row, total):
        return (self.data[row, field, :, :total].transpose(0, 1).float() for field in (0, 1))


class _Pages:
    """Paged: pool [blocks, layers, 2, K, tokens_per_block, D]; offsets [pools, B, 2, blocks of a sequence] count slots."""

    def __init__(self, net, layer, offsets, host_offsets, pointers, pool_mapping):
        pool_index, in_pool = pool_mapping.data[layer].tolist()
        assert torch.equal(offsets.data, host_offsets.data)
        self.pool = net.pools[int(pointers.data[pool_index, 0])]
        self.offsets, self.layer, self.size = offsets.data[pool_index], in_pool, net.plugin_config.tokens_per_block

    def _slot(self, row, field, position):
        slots = self.pool.shape[1] * 2
        block, found = divmod(int(self.offsets[row, field, position // self.size]), slots)
        assert found == field, "an offset that is not the first layer's"
        return self.pool[block, self.layer, field, :, position % self.size]

    def append(self, row, past, k, v, dtype):
        for field, value in enumerate((k, v)):
            for index, token in enumerate(value):
                self._slot(row, field, past + index).copy_(token.to(dtype))

    def read(self, row, total):
        return (torch.stack([self._slot(row, field, p) for p in range(total)]).float() for field in (0, 1))
