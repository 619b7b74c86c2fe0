"""The machine: Python, processor, memory as far as limits allow, disk, what the file system can, ports."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import sys
from pathlib import Path

from scripts.doctoring.findings import Finding, State, isolated, size
from scripts.doctoring.requirements import Requirement, python_versions

GROUP = "machine"
FEATURES = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AMX": ("amx_int8", "amx_tile"),
    "NEON": ("asimd",),
    "dot product": ("asimddp",),
    "i8mm": ("i8mm",),
    "SVE": ("sve",),
}
"""What makes products of 8-bit integers fast, by the names that the kernel has for it."""
_LOCKS = """
import fcntl, json, os, sys, tempfile
found = {"lock": True, "link": True}
with tempfile.TemporaryDirectory(prefix=".ngpt-doctor.", dir=sys.argv[1]) as folder:
    path = os.path.join(folder, "a")
    one, two = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found["lock"] = False
        except BlockingIOError:
            pass
    except OSError:
        found["lock"] = False
    try:
        os.link(path, path + "2")
    except OSError:
        found["link"] = False
print(json.dumps(found))
"""


def python() -> Finding:
    """Its version."""
    wanted = Requirement("python", python_versions(), "")
    version = platform.python_version()
    state: State = "good" if wanted.takes(version) else "unfit"
    remedy = "" if state == "good" else "install a newer Python, and make a new environment with it"
    return Finding(GROUP, "Python", state, f"{version} ({sys.executable})", wanted.versions, remedy, needed=True)


def processor(root: Path = Path("/")) -> Finding:
    """Its name, the cores that this process may use, and the features that 8-bit products run by."""
    text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    have = [name for name, names in FEATURES.items() if flags & set(names)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _cpu_share(root)
    limited = "" if share is None or share >= cores else f", limited to the time of {share:g}"
    name = values.get("model name", platform.machine())
    return Finding(GROUP, "processor", "good", f"{name}, {cores} core(s){limited}, {', '.join(have) or 'no such feature'}")


def memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still get: of the machine, of its control groups, of its own limit."""
    text = (root / "proc/meminfo").read_text(encoding="utf-8")
    values = {key: int(value.split()[0]) << 10 for key, _, value in (line.partition(":") for line in text.splitlines())}
    most = values.get("MemAvailable", values.get("MemFree", 0))
    for limit, used in _memory_limits(root):
        most = min(most, max(0, limit - used))
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return most if soft == resource.RLIM_INFINITY else min(most, soft)


def _groups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of those above it, of either version."""
    found = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            number, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            if number != "0" and controller not in names.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
            folder = top / path.lstrip("/")
            found += [folder, *(above for above in folder.parents if above.is_relative_to(top))]
    return found


def _memory_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) in bytes, of each control group that has a limit."""
    found = []
    for folder in _groups(root, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                found.append((int((folder / limit).read_text()), int((folder / used).read_text())))
    return found


def _cpu_share(root: Path) -> float | None:
    """Processors whose time the control groups allow; None where they set no limit."""
    shares = []
    for folder in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def enough_memory(needed: int | None, why: str, root: Path = Path("/")) -> Finding:
    """Memory against what a build needs; None where nobody asked for one."""
    have = memory(root)
    if needed is None:
        return Finding(GROUP, "memory", "good", f"{size(have)} can be had")
    state: State = "good" if have >= needed else "unfit"
    remedy = "" if state == "good" else "close other programs, raise the container's limit, or use a machine with more memory"
    wanted = f"about {size(needed)}: {why}"
    return Finding(GROUP, "memory", state, f"{size(have)} can be had", wanted, remedy, needed=True)


def disk(place: Path, needed: int | None, why: str) -> Finding:
    """Room where the engine would be written."""
    folder = standing(place)
    free = shutil.disk_usage(folder).free
    wanted = "" if needed is None else f"{size(needed)}: {why}"
    state: State = "good" if needed is None or free >= needed else "unfit"
    remedy = "" if state == "good" else "free some room, or choose another --output"
    return Finding(GROUP, "disk", state, f"{size(free)} free in {folder}", wanted, remedy, needed=needed is not None)


def file_system(place: Path) -> Finding:
    """Whether builds there can be told from dead ones (locks), and continued without a copy (hard links)."""
    folder = standing(place)
    if not os.access(folder, os.W_OK):
        return Finding(GROUP, "file system", "unfit", f"{folder} cannot be written", "", "choose another --output", needed=True)
    answer = isolated(_LOCKS, str(folder), limit=20.0)
    if answer.trouble:
        return Finding(GROUP, "file system", "unknown", f"{folder}: {answer.trouble}", "locks of files (flock)")
    locks, links = answer.value["lock"], answer.value["link"]
    found = f"{'locks' if locks else 'no locks'}, {'hard links' if links else 'no hard links'} in {folder}"
    remedy = "" if locks else "builds work, but what a killed one left is not swept there: remove it, or use a local disk"
    return Finding(GROUP, "file system", "good" if locks else "unfit", found, "locks of files (flock)", remedy)


def shared_memory(root: Path = Path("/")) -> Finding:
    """/dev/shm, through which the server and its models exchange tensors."""
    total = shutil.disk_usage(root / "dev/shm").total
    state: State = "good" if total >= 64 << 20 else "unfit"
    remedy = "" if state == "good" else "docker run --shm-size=256m ..."
    return Finding(GROUP, "shared memory", state, f"{size(total)} in /dev/shm", "at least 64 MB", remedy)


def ports(numbers: tuple[int, ...] = (8000, 8001, 8002)) -> Finding:
    """Those of `serve`."""
    from ngpt.errors import ServerError
    from triton_repo.machine import check_port

    taken = []
    for number in numbers:
        try:
            check_port(number)
        except ServerError:
            taken.append(number)
    wanted = f"{', '.join(map(str, numbers))}: HTTP, gRPC, metrics"
    if not taken:
        return Finding(GROUP, "ports", "good", "free", wanted)
    found = f"taken: {', '.join(map(str, taken))}"
    return Finding(GROUP, "ports", "unfit", found, wanted, "ngpt-deploy serve --http-port 0 --grpc-port 0 --metrics-port 0 ...")


def standing(place: Path) -> Path:
    """The folder that is there already, of a path or above it."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.is_dir())
