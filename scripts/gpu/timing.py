"""Time on the device. Not executed on a CUDA device.

Short kernels are timed as a CUDA graph of many launches, so that the time the host takes to launch does not count; each launch of
the graph works on buffers of its own, so that together they exceed the L2 cache many times where memory allows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 20
MOST_SETS = 128  # launches in a graph, hence sets of buffers
L2_MULTIPLE = 4  # the sets together exceed the L2 cache by this factor


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph that makes all `calls` in order; they were warmed up, outside the graph, on the stream it is recorded on."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # All results live until the end of the recording, so that no call writes where the one before it did.
        results = [call() for call in calls]
    del results
    return graph


def seconds(run: Callable[[], object], replays: int = REPLAYS, warm_up: int = 3) -> float:
    """Median time of `run` between two events on the current stream, in seconds."""
    for _ in range(warm_up):
        run()
    times: list[float] = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def seconds_per_call(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one of `calls`, from replays of all of them as one graph."""
    graph = graph_of(calls)
    return seconds(graph.replay) / len(calls)


def sets_of_buffers(bytes_per_set: int, l2_bytes: int) -> tuple[int, bool]:
    """(how many sets of buffers to rotate, whether together they exceed L2 by L2_MULTIPLE)."""
    wanted = -(-L2_MULTIPLE * l2_bytes // bytes_per_set)
    return max(4, min(MOST_SETS, wanted)), wanted <= MOST_SETS


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy of `size` bytes within the device: what the others are held against."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.fill_(1)
    return 2 * size / seconds(lambda: target.copy_(source))
