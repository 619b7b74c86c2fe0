"""TEST DOUBLE of `tensorrt_llm.functional`: signatures of tensorrt_llm/functional.py, NVIDIA/TensorRT-LLM commit 00714966."""

import numpy as np
import torch

from tests.doubles.tensorrt_llm_double.attention import gpt_attention
from tests.doubles.tensorrt_llm_double.tensor import Tensor, binary, made
from tests.doubles.tensorrt_llm_double.world import DTYPES, default_net, rank, world

__all__ = ["Tensor", "gpt_attention"]


def _create_tensor(trt_tensor, producer):
    assert producer is not None
    return made(trt_tensor)


def constant(ndarray, as_dtype=None, as_shape=None):
    assert isinstance(ndarray, np.ndarray) and ndarray.flags.c_contiguous and as_dtype is None and as_shape is None
    return made(torch.from_numpy(ndarray.copy()))


def cast(input, dtype):
    assert isinstance(dtype, str), dtype
    return made(input.data.to(DTYPES[dtype]))


def view(input, shape, zero_is_placeholder=True):
    """0 keeps the input's size, one -1 is inferred: a static IShuffleLayer."""
    assert isinstance(shape, list | tuple) and zero_is_placeholder and list(shape).count(-1) <= 1
    return made(input.data.reshape([input.shape[i] if size == 0 else size for i, size in enumerate(shape)]))


def split(tensor, split_size_or_sections, dim=0):
    assert isinstance(split_size_or_sections, list)  # torch checks their sum
    return [made(part) for part in torch.split(tensor.data, split_size_or_sections, dim)]


def concat(inputs, dim=0):
    assert len({x.data.dtype for x in inputs}) == 1, [x.dtype for x in inputs]
    return made(torch.cat([x.data for x in inputs], dim))


def sum(input, dim, keepdim=False):  # noqa: A001  (the source's name)
    return made(input.data.sum(dim, keepdim=keepdim))


def sqrt(input):
    assert input.dtype != "int32"
    return made(input.data.sqrt())


def maximum(left, right):
    return binary(left, right, torch.maximum)


def relu(input):
    return made(torch.relu(input.data))


def silu(input):
    return made(input.data * torch.sigmoid(input.data))


def gelu(x):
    """The tanh approximation, as in the source."""
    return made(torch.nn.functional.gelu(x.data, approximate="tanh"))


def matmul(input, mat2, transa=False, transb=False, use_fp32_acc=True):
    """float16 is multiplied in float32, as the source does by default."""
    a, b = input.data, mat2.data
    assert a.dtype == b.dtype, f"matmul of {a.dtype} and {b.dtype}"
    a, b = (a.mT if transa else a), (b.mT if transb else b)
    return made((a.float() @ b.float()).to(input.data.dtype))


def embedding(input, weight, tp_size=1, tp_group=None, sharding_dim=0, tp_rank=None, per_token_scale=None, padding=None):
    assert input.dtype == "int32" and per_token_scale is None
    table = weight.data if padding is None else torch.cat([weight.data, padding.data])
    if tp_size == 1 or tp_group is None:
        assert int(input.data.max()) < len(weight.data), "an index beyond the table"
        return made(table[input.data.long()])
    assert sharding_dim == 0 and tp_rank is not None
    local = input.data.long() - tp_rank * len(weight.data)
    mine = (local >= 0) & (local < len(weight.data))
    rows = table[torch.where(mine, local, 0)]
    return allreduce(made(torch.where(mine[..., None], rows, torch.zeros((), dtype=rows.dtype))), tp_group)


def gather_last_token_logits(hidden_states, last_token_ids, remove_input_padding):
    if last_token_ids is None:
        return hidden_states
    rows = last_token_ids.data.long() - 1
    if remove_input_padding:  # inclusive prefix sums of the lengths
        return made(hidden_states.data[rows])
    return made(hidden_states.data[torch.arange(len(rows)), rows])


def _through_nccl(tensor):
    kind = default_net().plugin_config.nccl_plugin
    assert kind is not None, "a collective on one GPU"
    return tensor.data.to(DTYPES[kind])


def allreduce(tensor, group, all_reduce_params=None):
    default_net().collectives.append(("allreduce", tuple(tensor.shape)))
    parts = world().exchange(group, rank(), _through_nccl(tensor))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return made(total.to(tensor.data.dtype))


def allgather(tensor, group, gather_dim=0):
    default_net().collectives.append(("allgather", tuple(tensor.shape)))
    parts = world().exchange(group, rank(), _through_nccl(tensor))
    return made(torch.cat(parts, gather_dim).to(tensor.data.dtype))


def send(tensor, tgt):
    default_net().collectives.append(("send", tuple(tensor.shape)))
    world().post(rank(), tgt, _through_nccl(tensor))
    return made(tensor.data)


def recv(tensor, src):
    default_net().collectives.append(("recv", tuple(tensor.shape)))
    value = world().collect(src, rank())
    assert value.shape == tensor.data.shape, (value.shape, tensor.shape)
    return made(value.to(tensor.data.dtype))
