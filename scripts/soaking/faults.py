"""What goes wrong while requests are in flight: a stop, a kill, a reload, an unload, more requests than the queue holds."""

from __future__ import annotations

import asyncio
import collections
import os
import random
import signal
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from ngpt.errors import ServerError
from scripts.soaking.asking import WAYS, Asker
from scripts.soaking.served import Task, metrics, model_process
from triton_repo.client import generate_text
from triton_repo.server import TritonServer

FAULTS = ("SIGTERM", "SIGTERM past its limit", "kill -9 of a model", "kill -9 of the server", "reload", "unload")


def overload(server: TritonServer, tasks: list[Task], *, streams: int, length: int) -> dict[str, object]:
    """Many more requests at once than the queue holds: each is answered, or refused, within a bound."""
    task = next(task for task in tasks if task.length == length)

    async def run() -> tuple[collections.Counter[str], list[float], list[float], str]:
        asker = Asker(server.grpc_url, server.http_url, patience=120.0, channels=32)
        times: dict[str, list[float]] = collections.defaultdict(list)

        async def one() -> None:
            start = time.monotonic()
            times[await asker.ask(task, "grpc")].append(time.monotonic() - start)

        await asyncio.gather(*(one() for _ in range(streams)))
        await asker.close()
        counted = collections.Counter({ending: len(each) for ending, each in times.items()})
        return counted, times["right"], times["error"], asker.last_error

    endings, right, refused, said = asyncio.run(run())
    return {
        "requests at once": streams,
        **{ending: endings[ending] for ending in ("right", "error", "wrong", "hung")},
        "slowest answer, s": round(max(right, default=0.0), 1),
        "slowest refusal, s": round(max(refused, default=0.0), 2),
        "refused with": said,
        "not answered afterwards": 0 if answers(server) else 1,
    }


def fault(models: Path, tasks: list[Task], name: str, *, times: int, streams: int) -> dict[str, object]:
    """Make one fault so often, each time with streams in flight, and say how they ended."""
    endings: collections.Counter[str] = collections.Counter()
    ended: list[float] = []
    recovered: list[float] = []
    errors: set[str] = set()
    long = [task for task in tasks if task.length >= 100]
    known = [path.name for path in models.iterdir()]
    explicit = ["--model-control-mode=explicit", *(f"--load-model={model}" for model in known)]
    again = name in ("reload", "unload")
    lost = 0
    server = None
    try:
        for number in range(times):
            if server is None:
                limit = 1.0 if name == "SIGTERM past its limit" else 60.0
                server = TritonServer(models, start_timeout=120, stop_timeout=limit, arguments=explicit if again else ())
                server.start()
                if "kill" in name:
                    threading.Thread(target=_watch, args=(server,), daemon=True).start()
            makes = _makes(server, name)
            counted, took, said = asyncio.run(_with_streams(server, long, streams, number, makes))
            endings += counted
            ended.append(took)
            errors |= said
            if name == "unload":
                _change(server, "load")
            if "SIGTERM" in name:
                server.stop()
                server = None
                continue
            start = time.monotonic()
            lost += not answers(server, 60.0)
            recovered.append(time.monotonic() - start + took)
    finally:
        if server is not None:
            server.stop()
    figures: dict[str, object] = {"times": times, "streams": streams}
    figures |= {ending: endings[ending] for ending in ("right", "error", "wrong", "hung")}
    figures["last of them ended after, s"] = f"{statistics.median(ended):.1f} (at most {max(ended):.1f})"
    if recovered:
        figures["served again after, s"] = f"{statistics.median(recovered):.1f} (at most {max(recovered):.1f})"
        figures["not answered afterwards"] = lost
    figures["errors"] = sorted(errors)[:6]
    return figures


def _watch(server: TritonServer) -> None:
    try:
        server.watch(lambda said: None if "again" in said else print("  ", said), most_deaths=1000)
    except ServerError as error:
        print("  ", error)


async def _with_streams(
    server: TritonServer, tasks: list[Task], streams: int, seed: int, makes: Callable[[], None]
) -> tuple[collections.Counter[str], float, set[str]]:
    """The endings of streams in whose middle the fault is made, and seconds from the fault to the last of them."""
    asker = Asker(server.grpc_url, server.http_url, patience=30.0)
    choose = random.Random(seed)
    errors: set[str] = set()

    async def one(way: str, task: Task) -> str:
        ending = await asker.ask(task, way)
        if ending == "error":
            errors.add(asker.last_error)
        return ending

    running = [asyncio.create_task(one(choose.choice(WAYS), choose.choice(tasks))) for _ in range(streams)]
    await asyncio.sleep(0.4 + 0.4 * choose.random())
    start = time.monotonic()
    await asyncio.get_running_loop().run_in_executor(None, makes)
    endings = collections.Counter(await asyncio.gather(*running))
    took = time.monotonic() - start
    await asker.close()
    return endings, took, errors


def _makes(server: TritonServer, name: str) -> Callable[[], None]:
    pid = server.pid
    assert pid is not None
    if name.startswith("SIGTERM"):
        # As `serve` stops: the signal, the limit, and an end for what has none of its own.
        return server.stop
    if name == "kill -9 of a model":
        return lambda: os.kill(model_process(server), signal.SIGKILL)
    if name == "kill -9 of the server":
        return lambda: os.kill(pid, signal.SIGKILL)
    return lambda: _change(server, "load" if name == "reload" else "unload")


def _change(server: TritonServer, what: str) -> None:
    request = urllib.request.Request(f"http://{server.http_url}/v2/repository/models/ensemble/{what}", b"{}")
    with urllib.request.urlopen(request, timeout=120) as response:
        response.read()


def answers(server: TritonServer, seconds: float = 30.0) -> bool:
    """Whether a request is answered, and then no slot is held."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            generate_text(server.grpc_url, "a", max_tokens=1, timeout=10.0)
            now = metrics(server)
            if not now["ngpt_requests_active"] + now["ngpt_requests_queued"]:
                return True
        except (ServerError, OSError):
            pass
        time.sleep(0.05)
    return False
