"""Many streams at once, for minutes: mixed lengths and clients, some of which leave. What stays must be right, and what they held
must come back."""

from __future__ import annotations

import asyncio
import collections
import random
import time

from scripts.soaking.asking import LEAVES, WAYS, Asker
from scripts.soaking.served import Task, memory, metrics
from triton_repo.server import TritonServer


def load(server: TritonServer, tasks: list[Task], *, streams: int, seconds: float, seed: int = 0) -> dict[str, object]:
    """`streams` clients, each asking again as soon as it was answered; a third of the requests leave early."""
    asyncio.run(_load(server, tasks, streams, min(seconds / 2, 10.0), seed + 1))  # so that memory is what it is under load
    before = memory(server)
    start = time.monotonic()
    endings, errors = asyncio.run(_load(server, tasks, streams, seconds, seed))
    took = time.monotonic() - start
    deadline = time.monotonic() + 30
    while (now := metrics(server))["ngpt_requests_active"] + now["ngpt_requests_queued"] and time.monotonic() < deadline:
        time.sleep(0.1)
    after = memory(server)
    return {
        "streams": streams,
        "seconds": round(took),
        **{ending: endings[ending] for ending in ("right", "left", "error", "wrong", "hung")},
        "requests/s": round(sum(endings.values()) / took, 1),
        "slots held at the end": now["ngpt_requests_active"] + now["ngpt_requests_queued"],
        "memory before, MB": round(before / 1e6),
        "memory after, MB": round(after / 1e6),
        "errors": errors,
    }


async def _load(
    server: TritonServer, tasks: list[Task], streams: int, seconds: float, seed: int
) -> tuple[collections.Counter[str], list[str]]:
    asker = Asker(server.grpc_url, server.http_url)
    endings: collections.Counter[str] = collections.Counter()
    errors: set[str] = set()
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        choose = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            way, task = choose.choice(WAYS), choose.choice(tasks)
            leaves = choose.random() < 0.33 and way != "grpc-whole" and task.length > 1
            leave_after = choose.randrange(1, task.length) if leaves else None
            leave = choose.choice(LEAVES[:2]) if way in ("tokens", "alias") else "cancel"
            if choose.random() < 0.05:
                leave = "end"
            if way == "alias" and leaves:
                leave = "stop"  # a cancellation does not pass through a Triton ensemble
            ending = await asker.ask(task, way, leave_after, leave)
            endings[ending] += 1
            if ending == "error":
                errors.add(asker.last_error)

    await asyncio.gather(*(client(number) for number in range(streams)))
    await asker.close()
    return endings, sorted(errors)[:10]
