"""store: the engines that `build --store` keeps. Needs neither torch nor a runtime."""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from ngpt.errors import BuildError, NGPTDeployError
from scripts.commands.options import Bar, Command
from scripts.terminal import plain

_DAY = 86400.0
_ACTIONS = ("list", "check", "prune")


def add_store(command: Command) -> None:
    """`ngpt-deploy store`."""
    store = command(
        "store",
        _store,
        "List, check or prune the engines of a store (build --store DIR). list: key, size, last use and name of each. check: "
        "hold every file against its digest. prune: remove what was used least recently, and what killed builds left.",
    )
    store.add_argument("action", choices=_ACTIONS, help="what to do")
    store.add_argument("store", type=Path, metavar="DIR", help="the store's folder")
    store.add_argument("--keep-gb", type=_amount, metavar="GB", help="prune: at most so many GB (10**9 bytes) stay")
    store.add_argument("--older-than", type=_amount, metavar="DAYS", help="prune: what was not used for so many days goes")
    store.add_argument("--json", action="store_true", help="print JSON alone: keys, bytes, times, and what each is made of")


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1e9, found {text[:40]}")
    return value


def _store(args: argparse.Namespace) -> int:
    from engines.store import Store

    if not args.store.is_dir():
        raise BuildError(f"there is no store at {args.store}", expected="the folder that build --store was given")
    bounds = (args.keep_gb, args.older_than)
    if (args.action == "prune") == (bounds == (None, None)):
        raise BuildError(
            f"store {args.action}", expected="--keep-gb or --older-than with prune, and with prune alone", found="not so"
        )
    store = Store(args.store)
    if args.action == "check":
        return _check(store, args)
    if args.action == "prune":
        keep, days = bounds
        entries = store.prune(
            keep_bytes=None if keep is None else int(keep * 1e9), older_than=None if days is None else days * _DAY
        )
    else:
        entries = store.entries()
    if args.json:
        print(json.dumps([_data(entry) for entry in entries], indent=2))
        return 0
    for entry in entries:
        print(_line(entry))
    what = "removed" if args.action == "prune" else "in all"
    print(f"{what}: {len(entries)} engine(s), {sum(entry.size for entry in entries) / 1e6:.1f} MB")
    return 0


def _check(store: Any, args: argparse.Namespace) -> int:
    from engines.runtime.errors import EngineFileError

    found = {}
    with Bar() as bar:
        for key in store.all_keys():
            try:
                store.check(store.read(key), bar)
                found[key] = ""
            except (NGPTDeployError, EngineFileError) as error:
                found[key] = str(error)
    if args.json:
        print(json.dumps({key: trouble or None for key, trouble in found.items()}, indent=2))
    else:
        for key, trouble in found.items():
            print(f"{key}  {'sound' if not trouble else plain(trouble, 500)}")
    return 2 if any(found.values()) else 0


def _data(entry: Any) -> dict[str, Any]:
    return {"key": entry.key, "engine": str(entry.engine), "bytes": entry.size, "used": _time(entry.used), "parts": entry.parts}


def _line(entry: Any) -> str:
    return f"{entry.key}  {entry.size / 1e6:9.1f} MB  {_time(entry.used)}  {plain(entry.label, 100)}"


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
