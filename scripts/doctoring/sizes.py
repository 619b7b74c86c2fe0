"""What a given build takes: memory, disk, and memory of the card. Run in a process of its own: a checkpoint's reader may need
torch."""

from __future__ import annotations

import math
from typing import Any

from engines.capacity import read_spec
from engines.memory import RESERVE, memory, total_bytes
from engines.target import load_target, with_kv_cache
from export.trtllm.parallel import Parallel
from ngpt.tensor_names import expected_tensors
from scripts.doctoring.findings import size

BASE, COPIES = 500e6, 2.5
"""Memory of a build: what its libraries take, and copies of the largest tensor in float32. Measured (docs/building.md): at most
350 MB, and 2.3 copies."""


def sizes(checkpoint: str | None, target: str, precision: str | None, kv_cache: str, tp: int, pp: int) -> dict[str, Any]:
    """In bytes: "memory" and "disk" of a build, "engine" (its weights), "card" (of one GPU, with one sequence of full length);
    and the reasons, as "memory_why" and so on.

    Raises what a build would raise for a checkpoint or target that cannot be used.
    """
    chosen, parallel = with_kv_cache(load_target(target, precision), kv_cache), Parallel(tp, pp)
    spec = read_spec(checkpoint)
    parallel.check(spec)
    largest = 4 * max(math.prod(expected.shape) for expected in expected_tensors(spec).values())
    engine = total_bytes(spec, chosen.precision, parallel)
    try:
        from engines.backends import backend_of

        disk = backend_of(chosen.runtime).estimate(spec, chosen, parallel)
    except ImportError:  # torch is not there, which is told elsewhere
        disk = 2 * engine
    found = {
        "memory": int(BASE + COPIES * largest),
        "memory_why": f"{size(BASE)} and {COPIES:g} copies of the largest tensor, {size(largest)}; to run or verify the "
        f"engine its weights as well, {size(engine)}",
        "disk": disk,
        "disk_why": "what a build writes at most",
        "engine": engine,
        "card": None,
    }
    if chosen.gpu is not None:
        needed = memory(spec, chosen, parallel)
        card = needed.weights + needed.activations + needed.cache_token * spec.max_length + RESERVE
        found |= {"card": card, "card_why": needed.arithmetic(1, spec.max_length)}
    return found
