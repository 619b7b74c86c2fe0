"""What a probe found, and probes that can hang or abort in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["good", "missing", "unfit", "unknown"]
"""There, and as it must be; not there; there, but not as it must be; the probe came to no result."""
ROOT = Path(__file__).resolve().parents[2]
_ERROR = 300  # characters of what a library said


@dataclass(frozen=True)
class Finding:
    """One line of the report. needed: what was asked for cannot be done without it. remedy: the command that brings it."""

    group: str
    name: str
    state: State
    found: str
    wanted: str = ""
    remedy: str = ""
    needed: bool = False

    @property
    def stops(self) -> bool:
        """Whether it keeps what was asked for from being done."""
        return self.needed and self.state in ("missing", "unfit")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "stops": self.stops}


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def guarded(group: str, name: str, probe: Callable[[], Finding]) -> Finding:
    """The probe's finding; whatever it raises is one, too."""
    try:
        return probe()
    except Exception as error:
        return Finding(group, name, "unknown", f"{type(error).__name__}: {error}"[:_ERROR])


@dataclass(frozen=True)
class Answer:
    """Of a process: its JSON value, or what kept it from one."""

    value: Any = None
    trouble: str = ""


def isolated(code: str, *arguments: str, limit: float = 60.0) -> Answer:
    """Run Python code that prints JSON in its last line, in a process of its own and for at most `limit` seconds.

    What it imports may abort or hang: then that is the answer. It is killed with all processes that it started.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return Answer(trouble=f"no process could be started: {error}"[:_ERROR])
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return Answer(trouble=f"no answer within {limit:.0f} seconds")
    finally:
        _end(process)
    if process.returncode < 0:
        return Answer(trouble=f"ended by {signal.Signals(-process.returncode).name}")
    lines = (out if process.returncode == 0 else err).decode("utf-8", "replace").strip().splitlines() or [""]
    if process.returncode:
        return Answer(trouble=lines[-1][:_ERROR] or f"exit code {process.returncode}")
    try:
        return Answer(json.loads(lines[-1]))
    except (ValueError, RecursionError):
        return Answer(trouble=f"an answer that cannot be read: {lines[-1]}"[:_ERROR])


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (OSError, AttributeError):
        process.kill()
    process.communicate()
