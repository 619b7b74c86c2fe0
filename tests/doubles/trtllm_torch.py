"""TEST DOUBLE of the part of TensorRT-LLM 1.3's PyTorch flow that `export.trtllm.modeling_ngpt` uses, on the CPU.

Our reading of tensorrt_llm/_torch/modules/attention.py (commit 00547a25), linear.py (00bbf71e), embedding.py
(fbbc05dd), decoder_layer.py (1cef851e) and models/modeling_utils.py (no commit known): signatures are theirs, unused
arguments are absent, meanings the documented ones. Ranks are threads that meet in their collectives
(tests/doubles/tensorrt_llm_double/world.py). Kernels, CUDA graphs, the executor and quantised linears are not
modelled.
"""

import math
import sys
import types
from contextlib import contextmanager
from enum import Enum
from types import SimpleNamespace

import torch
from torch import nn

from tests.doubles.modules import swapped
from tests.doubles.tensorrt_llm_double.world import rank, world

CLIENTS = ("export.trtllm.modeling_ngpt", "ngpt_trtllm")
MODEL_CLASS_MAPPING = {}


class TensorParallelMode(Enum):
    COLUMN = "column"
    ROW = "row"


class ModelConfig:
    def __init__(self, pretrained_config, mapping, quant_algo=None):
        self.pretrained_config, self.mapping = pretrained_config, mapping
        self.quant_config = SimpleNamespace(quant_algo=quant_algo)
        self.allreduce_strategy, self.extra_attrs = "AUTO", {}

    def get_quant_config(self):
        return self.quant_config


class AttentionMetadata:
    """A step of packed requests: tokens and past of each, and the cache, layer and request -> (keys, values)."""

    def __init__(self, requests, counts, past, cache):
        self.requests, self.counts, self.past, self.cache = requests, counts, past, cache
        self.num_tokens = sum(counts)


class Linear(nn.Module):
    def __init__(self, in_features, out_features, bias=True, *, dtype=None, mapping=None, tensor_parallel_mode=None,
                 gather_output=False, quant_config=None, weights=1, allreduce_strategy="AUTO"):  # fmt: skip
        super().__init__()
        assert quant_config is None or quant_config.quant_algo is None
        self.mapping, self.tp_mode, self.gather_output, self.weights = mapping, tensor_parallel_mode, gather_output, weights
        self.dtype = dtype
        ways = mapping.tp_size if tensor_parallel_mode else 1
        row = tensor_parallel_mode is TensorParallelMode.ROW
        assert (in_features if row else out_features) % ways == 0
        shape = (out_features // (1 if row else ways), in_features // (ways if row else 1))
        self.weight = nn.Parameter(torch.full(shape, math.nan, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.full(shape[:1], math.nan, dtype=dtype), requires_grad=False) if bias else None

    def _shard(self, tensor):
        row = self.tp_mode is TensorParallelMode.ROW
        if self.tp_mode is None or (row and tensor.ndim == 1):
            return tensor
        axis = 1 if row else 0
        each = math.ceil(tensor.shape[axis] / self.mapping.tp_size)
        start = self.mapping.tp_rank * each
        return tensor.narrow(axis, start, min(each, tensor.shape[axis] - start))

    def load_weights(self, weights):
        assert len(weights) == self.weights
        for kind in ("weight", "bias") if self.bias is not None else ("weight",):
            value = torch.cat([self._shard(part[kind]) for part in weights])
            target = getattr(self, kind)
            assert value.shape == target.shape, (value.shape, target.shape)
            target.data.copy_(value.to(target.dtype))

    def all_reduce(self, x):
        parts = world().exchange(self.mapping.tp_group, rank(), x)
        return torch.stack(parts).sum(0)

    def forward(self, input, *, all_reduce_params=None):
        assert input.dtype == self.weight.dtype, (input.dtype, self.weight.dtype)
        row = self.tp_mode is TensorParallelMode.ROW
        bias = None if row and self.mapping.tp_rank > 0 else self.bias  # added on one rank, before the sum
        out = nn.functional.linear(input, self.weight, bias)
        if row and self.mapping.tp_size > 1:
            return self.all_reduce(out)
        if self.gather_output and self.mapping.tp_size > 1:
            return torch.cat(world().exchange(self.mapping.tp_group, rank(), out), -1)
        return out


class LMHead(Linear):
    def __init__(self, num_embeddings, embedding_dim, dtype=None, mapping=None, tensor_parallel_mode=None, gather_output=False):
        self.padding_size = -num_embeddings % mapping.tp_size
        super().__init__(embedding_dim, num_embeddings + self.padding_size, bias=False, dtype=dtype, mapping=mapping,
                         tensor_parallel_mode=tensor_parallel_mode, gather_output=gather_output)  # fmt: skip
        self.num_embeddings = num_embeddings

    def load_weights(self, weights):
        shard = self._shard(weights[0]["weight"])
        self.weight.data.zero_()[: len(shard)].copy_(shard.to(self.weight.dtype))

    def forward(self, input):
        return super().forward(input)[..., : self.num_embeddings]

    def skip_forward(self, input):
        return input.new_empty((*input.shape[:-1], self.num_embeddings))


class Embedding(LMHead):
    def __init__(self, num_embeddings, embedding_dim, dtype=None, mapping=None, tensor_parallel_mode=None):
        assert tensor_parallel_mode is TensorParallelMode.COLUMN
        super().__init__(num_embeddings, embedding_dim, dtype, mapping, tensor_parallel_mode)
        self.width = embedding_dim

    def forward(self, input):
        local = input.long() - self.mapping.tp_rank * len(self.weight)
        mine = (local >= 0) & (local < len(self.weight))
        rows = self.weight[torch.where(mine, local, 0)].masked_fill(~mine[:, None], 0)
        return self.all_reduce(rows) if self.mapping.tp_size > 1 else rows

    def skip_forward(self, input):
        return torch.full((*input.shape, self.width), math.nan, dtype=self.dtype)


class Attention(nn.Module):
    def __init__(self, *, hidden_size, num_attention_heads, num_key_value_heads, max_position_embeddings, bias,
                 pos_embd_params=None, rope_fusion=None, layer_idx=None, dtype=None, dense_bias=None, config=None,
                 q_scaling=1.0, head_dim=None):  # fmt: skip
        super().__init__()
        assert pos_embd_params is None and rope_fusion is False, "the backend would encode positions itself"
        self.layer_idx, self.head_dim, self.q_scaling = layer_idx, head_dim, q_scaling
        mapping = config.mapping
        tp = mapping.tp_size
        self.num_heads, self.num_key_value_heads = num_attention_heads // tp, (num_key_value_heads + tp - 1) // tp
        self.q_size, self.kv_size = self.num_heads * head_dim, self.num_key_value_heads * head_dim
        common = {"dtype": dtype, "mapping": mapping, "quant_config": config.get_quant_config()}
        out = tp * (self.q_size + 2 * self.kv_size)
        self.qkv_proj = Linear(hidden_size, out, bias, tensor_parallel_mode=TensorParallelMode.COLUMN, weights=3, **common)
        self.o_proj = Linear(tp * self.q_size, hidden_size, bias, tensor_parallel_mode=TensorParallelMode.ROW, **common)

    def split_qkv(self, q, k=None, v=None):
        if k is None and v is None:
            q, k, v = q.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return q, k, v

    def apply_rope(self, q, k, v, position_ids):
        raise NotImplementedError

    def forward(self, position_ids, hidden_states, attn_metadata, all_reduce_params=None, lora_params=None):
        q, k, v = self.apply_rope(self.qkv_proj(hidden_states), None, None, position_ids)
        return self.o_proj(self._backend(*self.split_qkv(q, k, v), attn_metadata), all_reduce_params=all_reduce_params)

    def _backend(self, q, k, v, meta):
        assert q.dtype == k.dtype == v.dtype == self.qkv_proj.weight.dtype
        assert q.shape == (meta.num_tokens, self.q_size) and k.shape == v.shape == (meta.num_tokens, self.kv_size)
        parts = zip(meta.requests, meta.past, *(x.split(meta.counts) for x in (q, k, v)), strict=True)
        return torch.cat([self._one(meta.cache, *part) for part in parts])

    def _one(self, cache, request, past, q, k, v):
        keys, values = (x.view(len(x), -1, self.head_dim) for x in (k, v))
        if past:
            old = cache[rank(), self.layer_idx, request]
            assert len(old[0]) == past
            keys, values = torch.cat((old[0], keys)), torch.cat((old[1], values))
        cache[rank(), self.layer_idx, request] = keys, values
        group = self.num_heads // self.num_key_value_heads
        keys, values = (x.repeat_interleave(group, 1).transpose(0, 1).float() for x in (keys, values))
        scores = q.view(len(q), -1, self.head_dim).transpose(0, 1).float() @ keys.mT / (self.q_scaling * self.head_dim**0.5)
        later = torch.arange(keys.shape[1])[None, :] > past + torch.arange(len(q))[:, None]
        out = scores.masked_fill(later, -math.inf).softmax(-1) @ values
        return out.transpose(0, 1).flatten(1).to(q.dtype)


class DecoderLayer(nn.Module):
    def skip_forward(self, position_ids, hidden_states, attn_metadata, residual=..., **kwargs):
        return hidden_states if residual is ... else (hidden_states, residual)


class DecoderModel(nn.Module):
    def __init__(self, model_config):
        super().__init__()
        self.model_config = model_config

    def pp_init(self):
        """`__pp_init__`: what a stage does not hold is skipped, its ends receive and send."""
        mapping = self.model_config.mapping
        if not mapping.is_first_pp_rank():
            _skip(self.embed_tokens)
        mine = mapping.pp_layers(len(self.layers))
        for index, layer in enumerate(self.layers):
            if index not in mine:
                _skip(layer)
            if index == mine[0] and not mapping.is_first_pp_rank():
                layer.forward = _after_receiving(layer.forward, mapping.prev_pp_rank())
            if index == mine[-1] and not mapping.is_last_pp_rank():
                layer.forward = _before_sending(layer.forward, mapping.next_pp_rank())


def _skip(module):
    module.forward = module.skip_forward
    for part in module.modules():
        part._parameters.clear()
        part._buffers.clear()


def _after_receiving(forward, source):
    def receiving(position_ids, hidden_states, attn_metadata, residual=..., **kwargs):
        hidden_states.copy_(world().collect(source, rank()))
        return forward(position_ids, hidden_states, attn_metadata, residual=residual, **kwargs)

    return receiving


def _before_sending(forward, target):
    def sending(position_ids, hidden_states, attn_metadata, residual=..., **kwargs):
        out = forward(position_ids, hidden_states, attn_metadata, residual=residual, **kwargs)
        world().post(rank(), target, out)
        return out

    return sending


class _PostInit(type):
    def __call__(cls, *args, **kwargs):
        made = type.__call__(cls, *args, **kwargs)
        if made.model_config.mapping.pp_size > 1:
            if not made.model_config.mapping.is_last_pp_rank():
                _skip(made.lm_head)
            made.model.pp_init()
        return made


class DecoderModelForCausalLM(nn.Module, metaclass=_PostInit):
    def __init__(self, model, *, config, hidden_size, vocab_size):
        super().__init__()
        self.model_config, self.model = config, model
        self.lm_head = LMHead(vocab_size, hidden_size, dtype=config.pretrained_config.torch_dtype, mapping=config.mapping,
                              tensor_parallel_mode=TensorParallelMode.COLUMN, gather_output=True)  # fmt: skip
        if getattr(config.pretrained_config, "tie_word_embeddings", False):
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def config(self):
        return self.model_config.pretrained_config

    def forward(self, attn_metadata, input_ids=None, position_ids=None, inputs_embeds=None, return_context_logits=False):
        assert return_context_logits and position_ids.shape == (1, attn_metadata.num_tokens)
        out = self.model(
            input_ids=input_ids, attn_metadata=attn_metadata, position_ids=position_ids, inputs_embeds=inputs_embeds,
            spec_metadata=None, lora_params=None,
        )  # fmt: skip
        return self.lm_head(out).float()


def register_auto_model(name):
    def decorator(cls):
        MODEL_CLASS_MAPPING[name] = cls
        return cls

    return decorator


@contextmanager
def installed():
    """The modules under `tensorrt_llm._torch` in sys.modules; what imported them is dropped again at the end."""
    here = sys.modules[__name__]
    base = "tensorrt_llm._torch"
    packages = ["tensorrt_llm", base, f"{base}.models", f"{base}.modules"]
    names = ["models.modeling_utils", *(f"modules.{name}" for name in ("attention", "decoder_layer", "embedding", "linear"))]
    modules = {name: types.ModuleType(name) for name in packages} | {f"{base}.{name}": here for name in names}
    for name in packages:
        modules[name].__path__ = []
    try:
        with swapped(modules, CLIENTS):
            yield
    finally:
        MODEL_CLASS_MAPPING.clear()
