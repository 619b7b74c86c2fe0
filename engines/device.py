"""The GPU of this machine, asked of nvidia-smi: no CUDA package is needed to learn what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from engines.target import Target, load_target, load_targets, plain_name
from ngpt.errors import TargetError

_QUERY = "name,compute_cap,memory.total"


@dataclass(frozen=True)
class Device:
    """A GPU as its driver names it; memory in bytes."""

    name: str
    compute_capability: str
    memory_bytes: int


def detect() -> Device | None:
    """The first GPU, or None where there is no driver, no GPU, or an answer that cannot be read."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        asked = subprocess.run(
            [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse(asked.stdout) if asked.returncode == 0 else None


def parse(answer: str) -> Device | None:
    """The first line of nvidia-smi's CSV: name, capability, MiB of memory ("[N/A]" where it is shared with the host)."""
    parts = [part.strip() for part in answer.strip().split("\n")[0].rsplit(",", 2)]
    if len(parts) != 3 or not re.fullmatch(r"\d+\.\d+", parts[1]):
        return None
    memory = int(parts[2]) << 20 if parts[2].isdigit() else 0
    return Device(parts[0], parts[1], memory)


def target_for(device: Device) -> Target:
    """The target of a card: the one whose `cards` names it, else the smallest of the same compute capability.

    Only targets with `cards` are considered, so that a copy made for another purpose is not taken for a card of ours. Raises
    TargetError when no target has this compute capability (listing those there are), or when two claim the same name.
    """
    cards = [(t, t.gpu) for t in load_targets() if t.gpu is not None and t.gpu.cards]
    same = [(t, gpu) for t, gpu in cards if gpu.compute_capability == device.compute_capability]
    if not same:
        raise TargetError(
            f"no target fits {device.name} (compute capability {device.compute_capability})",
            expected="one of " + ", ".join(f"{t.name} ({gpu.compute_capability})" for t, gpu in cards),
            remedy="choose a cpu target, or write a target's file and give its path as --target",
        )
    plain = plain_name(device.name)
    named = [(len(plain_name(card)), t) for t, gpu in same for card in gpu.cards if plain_name(card) in plain]
    if not named:
        # The smallest card promises least.
        return min(same, key=lambda pair: pair[1].memory_gb)[0]
    # The longest name first: "L40S" before "L4".
    longest = max(length for length, _ in named)
    found = [t for length, t in named if length == longest]
    if len(found) > 1:
        raise TargetError(
            f"two targets name the card {device.name}",
            expected="one whose gpu.cards names it",
            found=", ".join(sorted(t.name for t in found)),
            remedy="give the one you mean as --target, or take the card's name out of the other file",
        )
    return found[0]


def place(card: str) -> Device:
    """What `inspect --on` names: "here", a target that has a GPU, or a compute capability (its memory is then unknown, 0).

    Raises TargetError for anything else, and for "here" where there is no GPU.
    """
    if card == "here":
        device = detect()
        if device is None:
            raise TargetError("no GPU was found here", remedy="name a target or a compute capability with --on")
        return device
    if re.fullmatch(r"\d+\.\d", card):
        return Device(f"compute capability {card}", card, 0)
    target = load_target(card)
    if target.gpu is None:
        raise TargetError(f"the target {card} has no GPU", remedy="name a GPU target, or a compute capability such as 8.9")
    return Device(card, target.gpu.compute_capability, int(target.gpu.memory_gb * 1e9))
