"""Plays the runtime of TensorRT-LLM's engine flow for the double: a batch of requests, a paged or contiguous cache, all ranks.

What each input holds in context and generation follows cpp/tensorrt_llm/batch_manager/runtimeBuffers.cpp
(`setFromInputs`) as stored.
"""

import numpy as np
import torch

from export.precision import TENSORRT_LLM
from export.trtllm.convert import convert
from export.trtllm.parallel import Parallel
from export.weights import DeployedWeights
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights
from tests.doubles.tensorrt_llm_double import installed
from tests.doubles.tensorrt_llm_double.attention import CONTEXT, GENERATION
from tests.doubles.tensorrt_llm_double.world import DTYPES, Network, World, use

BLOCK = 4  # tokens of a cache block
MAX_LEN = 64
ONE = Parallel()


def converted(checkpoint, folder, parallel=ONE, precision="fp32", kernels=None, kv_cache="auto"):
    """The checkpoint in TensorRT-LLM's format, in an existing folder."""
    numbers = TENSORRT_LLM[precision].with_cache({"auto": "auto", "fp8": "float8_e4m3"}[kv_cache])
    with open_checkpoint(checkpoint) as opened:
        weights = DeployedWeights(Weights(opened), arithmetic=numbers.arithmetic)
        convert(weights, folder, parallel, numbers, kernels=kernels)
    return folder


class Engine:
    """Slots of sequences on all ranks. `model_cls` is loaded from the converted folder, as trtllm-build would."""

    def __init__(self, folder, world_size=1, *, packed=True, slots=3):
        self.world, self.packed, self.slots = World(world_size), packed, slots
        self.lengths = [0] * slots
        with installed():
            from export.trtllm.model import NGPTForCausalLM
            from tests.doubles.tensorrt_llm_double.models import PretrainedConfig

            self.models = [
                NGPTForCausalLM.from_checkpoint(folder, rank, PretrainedConfig.from_json_file(folder / "config.json"))
                for rank in range(world_size)
            ]
        blocks = -(-MAX_LEN // BLOCK)
        order = np.random.default_rng(0).permutation(slots * blocks)
        self.blocks = order.reshape(slots, blocks)  # a sequence's blocks lie anywhere in the pool
        self.caches = [self._cache(model, slots * blocks) for model in self.models]
        self.networks = []

    def _cache(self, model, blocks):
        config, mapping = model.config, model.config.mapping
        layers = len(mapping.pp_layers(config.num_hidden_layers))
        heads = -(-config.num_key_value_heads // mapping.tp_size)
        if self.packed:
            shape = (blocks, layers, 2, heads, BLOCK, config.head_size)
        else:
            shape = (layers, self.slots, 2, heads, MAX_LEN, config.head_size)
        return torch.full(shape, 7.0, dtype=DTYPES[config.kv_dtype])  # what nobody has written must not matter

    def step(self, requests):
        """requests: (slot, token ids, whether it is a context request), context first -> logits float32 of each, [tokens, V]."""
        kinds = [CONTEXT if context else GENERATION for _, _, context in requests]
        counts = [len(ids) for _, ids, _ in requests]
        past = [self.lengths[slot] for slot, _, _ in requests]
        totals = [p + n for p, n in zip(past, counts, strict=True)]
        positions = [np.arange(p, t) for p, t in zip(past, totals, strict=True)]
        for (slot, _, _), total in zip(requests, totals, strict=True):
            self.lengths[slot] = total
        common = {
            "sequence_length": totals,
            "context_lengths": counts,
            "host_context_lengths": counts,
            "host_request_types": kinds,
            "host_past_key_value_lengths": [t if k == CONTEXT else p for k, t, p in zip(kinds, totals, past, strict=True)],
            "host_sink_token_length": [0],
        }
        common = {name: torch.tensor(value, dtype=torch.int32) for name, value in common.items()}
        common["cache_indirection"] = torch.zeros(len(requests), 1, MAX_LEN, dtype=torch.int32)
        common["host_runtime_perf_knobs"] = torch.zeros(16, dtype=torch.int64)
        common["host_context_progress"] = torch.zeros(1, dtype=torch.int64)
        if self.packed:
            tokens = np.concatenate([ids for _, ids, _ in requests]).astype(np.int32)
            places = np.concatenate(positions).astype(np.int32)
        else:
            assert [slot for slot, _, _ in requests] == list(range(self.slots))
            tokens, places = np.zeros((2, self.slots, max(counts)), np.int32)
            for row, ((_, ids, _), where) in enumerate(zip(requests, positions, strict=True)):
                tokens[row, : len(ids)], places[row, : len(ids)] = ids, where
        self.networks = self.world.run(lambda rank: self._run(rank, common, requests, tokens, places))
        logits = self.networks[-1].outputs["logits"][..., : self.models[-1].config.vocab_size]
        if self.packed:
            return [part.numpy() for part in torch.split(logits, counts)]
        return [logits[row, :n].numpy() for row, n in enumerate(counts)]

    def _run(self, rank, common, requests, tokens, places):
        model, cache = self.models[rank], self.caches[rank]
        config, mapping = model.config, model.config.mapping
        feeds = dict(common, input_ids=torch.from_numpy(tokens), position_ids=torch.from_numpy(places))
        feeds["hidden_states_input"] = torch.full((*tokens.shape, config.hidden_size), float("nan"), dtype=DTYPES[config.dtype])
        numbers = mapping.pp_layers(config.num_hidden_layers)
        feeds["host_max_attention_window_sizes"] = torch.full((len(numbers),), MAX_LEN, dtype=torch.int32)
        if self.packed:
            # The first layer's slots; a block holds keys and values of every layer of the stage.
            blocks = torch.from_numpy(self.blocks[[slot for slot, _, _ in requests]]) * 2 * len(numbers)
            feeds["kv_cache_block_offsets"] = torch.stack([blocks, blocks + 1], 1)[None].int()
            feeds["host_kv_cache_block_offsets"] = feeds["kv_cache_block_offsets"]
            feeds["host_kv_cache_pool_pointers"] = torch.tensor([[123, 0]])
            feeds["host_kv_cache_pool_mapping"] = torch.tensor([[0, i] for i in range(len(numbers))], dtype=torch.int32)
        else:
            feeds |= {f"past_key_value_{layer}": cache[i] for i, layer in enumerate(numbers)}
        net = Network(
            mapping, config.dtype, feeds, packed=self.packed, paged=self.packed, max_len=MAX_LEN, pools={123: cache},
            paged_context=self.packed and config.kv_dtype != "fp8",
        )  # fmt: skip
        use(net)
        inputs = model.prepare_inputs(
            max_batch_size=8, max_input_len=MAX_LEN, max_seq_len=MAX_LEN, max_num_tokens=256, use_cache=True,
            gather_context_logits=True,
        )  # fmt: skip
        model(**inputs)
        return net

    def read(self, slot, ids, chunks):
        """All logits of one sequence: context in pieces of the given sizes, then one token at a time."""
        parts, at = [], 0
        for size in chunks:
            parts += self.step([(slot, ids[at : at + size], True)])
            at += size
        for token in ids[at:]:
            parts += self.step([(slot, [token], False)])
        return np.concatenate(parts)
