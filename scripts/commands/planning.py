"""plan: arithmetic on a configuration, before anything is built."""

import argparse
import json

from engines.target import Target, load_target, with_kv_cache
from scripts.commands.building import KV_CACHE
from scripts.commands.options import Command, positive


def add_plan(command: Command, targets: list[Target]) -> None:
    """`ngpt-deploy plan`."""
    cards = ", ".join(target.name for target in targets if target.gpu is not None)
    plan = command("plan", _plan, "Compute the GPUs, memory and highest decode rate of a model under a load, before building.")
    plan.add_argument("--checkpoint", help="Hugging Face directory, ckpt.pt, or a config.json alone; the 8B model if not given")
    plan.add_argument("--target", default="h100", help=f"one with a GPU, or the path of a target's file: {cards}")
    plan.add_argument("--precision", help="another one that the target offers")
    plan.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto", help=KV_CACHE)
    plan.add_argument("--concurrency", type=positive, default=1, help="sequences at once")
    plan.add_argument("--context", type=positive, help="tokens of each, prompt included; the model's maximum if not given")
    plan.add_argument("--tp", type=positive, help="tensor-parallel degree; the smallest that fits if not given")
    plan.add_argument("--pp", type=positive, default=1, help="stages of a pipeline that the layers are divided among")
    plan.add_argument("--json", action="store_true", help="print JSON alone: bytes, and tokens per second")


def _plan(args: argparse.Namespace) -> int:
    from engines.capacity import plan_capacity, read_spec

    target = with_kv_cache(load_target(args.target, args.precision), args.kv_cache)
    spec = read_spec(args.checkpoint)
    found = plan_capacity(spec, target, args.concurrency, args.context or spec.max_length, args.tp, args.pp)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found.table())
    return 0
