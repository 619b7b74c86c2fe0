"""TEST DOUBLE: ranks as threads, their networks, and the collectives in which they meet.

`default_net` stands for tensorrt_llm/_common.py; a `Network` holds plugin_config (tensorrt_llm/plugin/plugin.py), what is fed to
its inputs, its outputs, and a record of collectives that tests may read.
"""

import enum
import threading
from types import SimpleNamespace

import torch

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn,
    "int32": torch.int32, "int64": torch.int64, "bool": torch.bool,
}  # fmt: skip
_here = threading.local()


class QuantMode(enum.IntFlag):
    """tensorrt_llm/quantization/mode.py (commit 03bcfcd1), the flags in use here."""

    FP8_KV_CACHE = 1 << 7
    FP8_QDQ = 1 << 8

    def has_fp8_kv_cache(self):
        return bool(self & QuantMode.FP8_KV_CACHE)


class Network:
    """One rank's network during one step. `feeds`: input name -> torch tensor."""

    def __init__(self, mapping, dtype, feeds, *, packed, paged, max_len, pools=None, paged_context=None):
        self.mapping, self.feeds, self.max_len, self.pools = mapping, feeds, max_len, pools
        self.plugin_config = SimpleNamespace(
            gpt_attention_plugin=dtype, gemm_plugin=dtype, nccl_plugin=dtype if mapping.world_size > 1 else None,
            remove_input_padding=packed, paged_kv_cache=paged, tokens_per_block=4, use_fp8_context_fmha=False,
            use_paged_context_fmha=packed if paged_context is None else paged_context,
        )  # fmt: skip
        self.outputs, self.inputs, self.collectives = {}, {}, []
        self.num_layers = 0

    def get_layer(self, index):
        assert 0 <= index < self.num_layers
        return object()


class World:
    """`run(function)` calls function(rank) in a thread a rank and returns the results; collectives wait for each other."""

    def __init__(self, size):
        self.size = size
        self.lock = threading.Lock()
        self.barriers, self.mail = {}, {}

    def run(self, function):
        results, errors = [None] * self.size, []

        def work(rank):
            _here.world, _here.rank = self, rank
            try:
                results[rank] = function(rank)
            except BaseException as error:  # noqa: BLE001  (handed to the test below)
                errors.append(error)
                for barrier in self.barriers.values():
                    barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        if errors:
            raise (real or errors)[0]
        return results

    def exchange(self, group, rank, value):
        """The values of all ranks of a group, in the group's order."""
        key = tuple(group)
        with self.lock:
            barrier = self.barriers.setdefault(key, threading.Barrier(len(key), timeout=30))
            slots = self.mail.setdefault(key, {})
        slots[rank] = value
        barrier.wait()
        values = [slots[r] for r in key]
        barrier.wait()  # nobody writes the next value before all have read this one
        return values

    def post(self, source, target, value):
        with self.lock:
            event, box = self.mail.setdefault(("p2p", source, target), (threading.Semaphore(0), []))
        box.append(value)
        event.release()

    def collect(self, source, target):
        with self.lock:
            event, box = self.mail.setdefault(("p2p", source, target), (threading.Semaphore(0), []))
        assert event.acquire(timeout=30), f"rank {target} waits for rank {source}, which sends nothing"
        return box.pop(0)


def use(network):
    """Make `network` the one that operations of this thread go to."""
    _here.network = network


def default_net():
    return _here.network


def world():
    return _here.world


def rank():
    return _here.rank


def default_trtnet():
    """The INetworkDefinition: here the network itself, whose last layer is whatever was added last."""
    return _here.network
