"""inspect: what an engine folder is, from its manifest, after its files were held against it. Needs neither torch nor a
runtime."""

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from scripts.commands.options import Bar, Command
from scripts.terminal import plain

_MOST_SHOWN = 20  # entries of a list


def add_inspect(command: Command) -> None:
    """`ngpt-deploy inspect`."""
    inspect = command("inspect", _inspect, "Tell what an engine was built from, for what, and whether it is verified.")
    inspect.add_argument("engine", type=Path, help="engine folder; one with a missing or altered file is refused")
    inspect.add_argument("--quick", action="store_true", help="compare the files' sizes alone, not their SHA-256")
    inspect.add_argument("--json", action="store_true", help="print JSON alone: the manifest itself")
    inspect.add_argument(
        "--require-signature",
        type=Path,
        metavar="KEY",
        help="public key in PEM: fail unless its private half signed the verdict, and that is a pass",
    )
    inspect.add_argument(
        "--on",
        metavar="CARD",
        help="say whether it would load there: a target's name, a compute capability such as 8.9, or 'here'",
    )


def _inspect(args: argparse.Namespace) -> int:
    from engines.runtime.errors import ServingError
    from engines.runtime.manifest import read_manifest, verify_files
    from engines.runtime.verdict import standing

    manifest = read_manifest(args.engine)
    with Bar() as bar:
        verify_files(args.engine, manifest, digests=not args.quick, progress=bar)
    trouble, verdict = None, ""
    try:
        verdict = standing(args.engine, manifest)
    except ServingError as error:
        trouble = error
    if args.json:
        print(json.dumps(manifest.to_dict(), indent=2))
    else:
        for line in _lines(manifest, args.engine, args.quick, verdict):
            print(line)
    if trouble is not None:
        raise trouble
    if args.require_signature is not None:
        from engines.signing import check_signature

        check_signature(args.engine, manifest, args.require_signature)
    # With --json standard output is JSON alone.
    return 0 if args.on is None else _tell_whether_it_loads(manifest, args.on, sys.stderr if args.json else sys.stdout)


def _lines(manifest: Any, folder: Path, quick: bool, verdict: str) -> Iterable[str]:
    target, model, flags = manifest.target, manifest.model, manifest.flags
    size = sum(entry.bytes for entry in manifest.files.values())
    yield f"engine   {_some([manifest.name])}, built {_some([manifest.created])}"
    checked = "sizes as the manifest says; contents not checked" if quick else "sizes and SHA-256 as the manifest says"
    yield f"files    {len(manifest.files)}, {size / 1e6:.1f} MB, {checked}"
    where = _some(target.providers[:1]) or f"compute capability {_some([flags.get('compute_capability') or 'any'])}"
    yield f"target   {_some([target.name])}: {_some([target.runtime, target.precision])}, {where}, cache {target.cache}"
    if manifest.precision:  # an engine of version 0.1 has none
        yield f"formats  {_some(f'{key} {manifest.precision.get(key)}' for key in ('projections', 'head', 'embedding'))}"
    sizes = f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads}/{model.num_kv_heads} heads"
    yield f"model    {sizes} of {model.head_dim}, vocabulary {model.vocab_size}, up to {model.max_length} tokens"
    for name, digest in list(manifest.digests.items())[:_MOST_SHOWN]:
        yield f"{_some([name]):8} {_some([digest])}"
    yield f"tools    {_some(f'{name} {version}' for name, version in manifest.tools.items())}"
    if manifest.parity is None:
        yield f"parity   not verified{f': {plain(target.note, 500)}' if target.note else ''}"
    else:
        page = manifest.parity.get("html")
        where = f"  (report: {folder / plain(page, 100)})" if isinstance(page, str) else ""
        said = {"unbound": "unknown: the verdict does not say which files it was reached on", "": "none that holds"}
        yield f"parity   {said.get(verdict, verdict)}{where if verdict in ('pass', 'fail') else ''}"


def _some(items: Iterable[object]) -> str:
    """A list in one line, each of its first entries as far as 100 characters."""
    shown = [plain(item, 100) for item in items]
    return ", ".join(shown[:_MOST_SHOWN]) + (f" and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else "")


def _tell_whether_it_loads(manifest: Any, card: str, file: TextIO) -> int:
    """Print to `file` what keeps an engine from running on a card; 0 if nothing does, else 2. No GPU is touched."""
    from engines.device import place
    from engines.runtime.compatibility import problems

    where = place(card)
    version = _installed_version(manifest.target.runtime) if card == "here" else None
    found = problems(
        manifest,
        tensorrt_version=version,
        compute_capability=where.compute_capability,
        memory_bytes=where.memory_bytes or None,
    )
    verdict = "nothing in the manifest speaks against it" if not found else "would not load"
    print(f"on       {plain(where.name, 100)}: {verdict}", file=file)
    for problem in found:
        print(f"         {plain(problem)}", file=file)
    return 2 if found else 0


def _installed_version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None
