"""Ways to spoil a file: its bytes, its JSON, its TOML, the place where it lies. Each takes the random numbers of one case, so
that a case is the same whenever it is made."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = 20_000  # levels of nesting in text
_ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e\n"
PATHS = (
    "../x",
    "/etc/passwd",
    "a/../../../etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "C:\\x",
    "\\\\host\\x",
    "x" * 5000,
    "\ud800",
    "~/x",
    "a//b",
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(2**63),
    0.5,
    1e308,
    5e-324,
    -0.0,
    1.0,
)
TEXTS = ("", "x", "true", "1", "null", "NaN", _ESCAPE, "\u0000", "é" * 100, "x" * 100_000, "%s%n{}{0.__class__}", "日本", *PATHS)


class Raw(str):
    """Text that goes into a file as it is."""


def value(pick: random.Random, depth: int = 2) -> Any:
    """Of any type and size that JSON has, and of some that it does not."""
    kind = pick.randrange(12 if depth else 9)
    if kind < 3:
        return pick.choice(NUMBERS)
    if kind < 5:
        return pick.choice(TEXTS)
    if kind < 9:
        odd: tuple[Any, ...] = (
            None,
            True,
            False,
            [],
            {},
            Raw("NaN"),
            Raw("-Infinity"),
            Raw("1e999"),
            Raw("[" * DEEP),
            Raw("1" * 5000),
            [0] * 10_000,
        )
        return pick.choice(odd)
    if kind == 9:
        return [value(pick, depth - 1) for _ in range(pick.randrange(5))]
    if kind == 10:
        return {str(pick.choice(TEXTS))[:200]: value(pick, depth - 1) for _ in range(pick.randrange(4))}
    levels, end = pick.choice((40, 300, 900, 3000)), pick.choice(("1", "[]", '"x"', ""))
    return Raw("[" * levels + end + "]" * levels if pick.random() < 0.5 else '{"a":' * levels + end + "}" * levels)


def spoil_bytes(data: bytes, pick: random.Random) -> bytes:
    """Bits turned, an end missing, parts repeated, moved or replaced."""
    made = bytearray(data)
    for _ in range(pick.choice((1, 1, 1, 2, 5, 40))):
        size, kind = len(made), pick.randrange(8)
        at = pick.randrange(size + 1)
        length = min(size - at, pick.choice((1, 2, 4, 8, 64, 1000)))
        if kind < 2 and at < size:
            made[at] ^= 1 << pick.randrange(8)
        elif kind == 2:
            del made[at:]
        elif kind == 3:
            made[at : at + length] = pick.randbytes(length)
        elif kind == 4:
            made[at:at] = made[at : at + length]
        elif kind == 5:
            del made[at : at + length]
        elif kind == 6:
            made[at : at + length] = pick.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
        else:
            made += pick.randbytes(pick.choice((1, 8, 1000)))
    return bytes(made)


def spoil_json(tree: Any, pick: random.Random, names: tuple[str, ...] = ()) -> bytes:
    """One to three places of a tree of JSON changed, spelled in one of several ways. names: keys that readers look for."""
    tree = json.loads(json.dumps(tree))
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        tree = _changed(tree, pick, names)
    text = spelled(tree, pick if pick.random() < 0.2 else None)
    if pick.random() < 0.08:
        wide = (
            text.encode("utf-16", "surrogatepass"),
            text.encode("utf-8", "surrogatepass") + b"\0",
            b"[" * DEEP,
            b'{"a":' * DEEP,
        )
        return pick.choice((*wide, b"\xff" + text.encode("utf-8", "surrogatepass"), b"", b" " * 5000, b'"\\ud800"'))
    return (b"\xef\xbb\xbf" if pick.random() < 0.05 else b"") + text.encode("utf-8", "surrogatepass")


def _changed(tree: Any, pick: random.Random, names: tuple[str, ...]) -> Any:
    places = list(_places(tree))
    if not places or pick.random() < 0.02:
        return value(pick)
    holder, key = pick.choice(places)
    kind = pick.randrange(8)
    if kind < 3:
        holder[key] = value(pick)
    elif kind == 3:
        del holder[key]
    elif kind == 4:
        holder[key] = _other_type(holder[key], pick)
    elif isinstance(holder, list):
        holder.insert(key, pick.choice((value(pick, 1), holder[key])))
        if kind == 7:
            holder[:] = holder * pick.choice((2, 50))
    elif kind == 5:
        holder[pick.choice((*names, *TEXTS[:8], *PATHS))] = value(pick)
    elif kind == 6:
        holder[pick.choice(PATHS)] = holder.pop(key)
    else:
        other, taken = pick.choice(places)
        with contextlib.suppress(KeyError, IndexError, TypeError):
            holder[key] = copy.deepcopy(other[taken])
    return tree


def _places(tree: Any) -> Any:
    """(holder, key) of everything inside."""
    if isinstance(tree, dict):
        for key, inner in tree.items():
            yield tree, key
            yield from _places(inner)
    elif isinstance(tree, list):
        for at, inner in enumerate(tree[:50]):
            yield tree, at
            yield from _places(inner)


def _other_type(old: Any, pick: random.Random) -> Any:
    choices: list[Callable[[], Any]] = [lambda: [old], lambda: {"a": old}, lambda: str(old), lambda: None, lambda: True]
    if isinstance(old, bool | int | float):
        choices += [lambda: old + 1, lambda: -old, lambda: old * 2**20, lambda: float(old), lambda: old * 0.5, lambda: old + 1e-9]
    if isinstance(old, str):
        choices += [lambda: old.upper(), lambda: old + "\0", lambda: old * 1000, lambda: old[:-1], lambda: " " + old]
    with contextlib.suppress(OverflowError):
        return pick.choice(choices)()
    return 0


def spelled(tree: Any, pick: random.Random | None = None) -> str:
    """JSON, `Raw` as it is, and with `pick` now and then a key twice."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict):
        items = list(tree.items())
        if pick is not None and items and pick.random() < 0.3:
            items.append(pick.choice(items))
        return "{" + ",".join(f"{json.dumps(str(key))}:{spelled(inner, pick)}" for key, inner in items) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(spelled(inner, pick) for inner in tree) + "]"
    return _number(tree) if isinstance(tree, int) and not isinstance(tree, bool) else json.dumps(tree)


def _number(number: int) -> str:
    return f"{number:d}" if number.bit_length() < 10_000 else "1" + "0" * 4000


def spoil_toml(text: str, pick: random.Random) -> bytes:
    """Lines of TOML lost, doubled, moved, with other values, keys and tables."""
    lines = text.splitlines()
    for _ in range(pick.choice((1, 1, 2, 4))):
        at, kind = pick.randrange(len(lines) or 1), pick.randrange(8)
        line = lines[at] if lines else ""
        name = line.partition("=")[0].strip() or "x"
        if kind < 3:
            with contextlib.suppress(UnicodeEncodeError):
                lines[at : at + 1] = [f"{name} = {_toml(pick)}"]
        elif kind == 3:
            lines[at : at + 1] = []
        elif kind == 4:
            lines.insert(at, line)
        elif kind == 5:
            lines.insert(
                at, pick.choice(("[gpu]", "[[gpu]]", "[profile]", "[gpu.x]", "[" + "a." * 2000 + "b]", "a." * 2000 + "b = 1"))
            )
        elif kind == 6:
            lines.insert(at, f"{pick.choice(('name', 'unknown', 'precision', 'cards', '__class__'))} = {_toml(pick)}")
        else:
            pick.shuffle(lines)
    made = "\n".join(lines).encode("utf-8", "surrogatepass")
    return spoil_bytes(made, pick) if pick.random() < 0.2 else made


def _toml(pick: random.Random) -> str:
    odd = (
        "nan",
        "inf",
        "-inf",
        "true",
        "1979-05-27",
        "00",
        "0x" + "f" * 5000,
        "[" * 5000,
        "{a=" * 2000,
        "1" * 5000,
        "[1, 'a', []]",
        "''",
        "1e400",
    )
    return pick.choice((*odd, json.dumps(pick.choice(TEXTS)), str(pick.choice(NUMBERS))[:300], "[" + "'x'," * 1000 + "]"))


def misplace(path: Path, pick: random.Random) -> None:
    """Something else in the place of a file: a link, a folder, a pipe, a device, nothing."""
    kind = pick.randrange(9)
    path.unlink(missing_ok=True)
    if kind == 0:
        path.symlink_to(
            pick.choice(("/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "nowhere", path.name, "..", "/"))
        )
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.write_bytes(b"")
    elif kind == 4:
        with path.open("wb") as file:  # as large as it says, and empty: a file with a hole
            file.truncate(pick.choice((1 << 20, 1 << 33, 1 << 40)))
    elif kind == 5:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif kind == 6:
        path.write_bytes(b"<!DOCTYPE html><html>" + pick.randbytes(100))
    elif kind == 7:
        path.symlink_to("/proc/self/environ")


def clear(folder: Path) -> None:
    """An empty folder, whatever was in it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        folder.unlink()
    folder.mkdir(exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            clear(entry)
            entry.rmdir()
        else:
            entry.unlink()
