#!/usr/bin/env python3
"""Teacher-forced logits of a TensorRT-LLM engine against PyTorch, in three steps that need not share an environment.

    trtllm_parity.py reference --checkpoint DIR --precision bf16 --output reference.npz     torch, transformers 5
    mpirun -n RANKS trtllm_parity.py run --engine DIR --reference reference.npz --output run.npz      tensorrt_llm 1.2
    trtllm_parity.py compare --reference reference.npz --run run.npz                        numpy

The engine must be built with --gather_context_logits. `run` follows tensorrt_llm/runtime/model_runner_cpp.py as stored (no
commit known) and has not been executed; the other two steps are tested.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MULTIPLE = 4.0
"""As the gate of every other engine: the error may be this many times what PyTorch itself loses in the engine's type."""


def reference(args: argparse.Namespace) -> int:
    """Write tokens, float32 logits, and the logits PyTorch computes in the engine's type."""
    from engines.parity.prompts import make_sequences
    from engines.parity.reference import Variant, run_reference
    from export.precision import TENSORRT_LLM
    from ngpt.checkpoint import open_checkpoint

    dtype = TENSORRT_LLM[args.precision].arithmetic
    with open_checkpoint(args.checkpoint) as checkpoint:
        steps = min(32, checkpoint.spec.max_length // 2)
        sequences = make_sequences(checkpoint, None, max_length=checkpoint.spec.max_length, decode_steps=steps, seed=0)
        tokens = [sequence.tokens for sequence in sequences]
        variants = [Variant("logits", "float32" if dtype != "float32" else "float64"), Variant("noise", dtype)]
        outputs = run_reference(checkpoint, tokens, variants)
    found: dict[str, Any] = {"precision": args.precision}
    found |= {f"tokens.{index}": np.array(ids, np.int32) for index, ids in enumerate(tokens)}
    found |= {f"{name}.{index}": logits for name, several in outputs.items() for index, logits in enumerate(several)}
    np.savez(args.output, **found)
    return 0


def run(args: argparse.Namespace) -> int:
    """Write the engine's logits of every position of every sequence; rank 0 alone writes."""
    import tensorrt_llm
    import torch
    from tensorrt_llm.runtime import ModelRunnerCpp

    import export.trtllm.model  # noqa: F401  (its import adds the architecture to TensorRT-LLM's table)

    rank = tensorrt_llm.mpi_rank()
    with np.load(args.reference) as data:
        tokens = [torch.from_numpy(data[f"tokens.{i}"]) for i in range(count(data))]
        vocabulary = data["logits.0"].shape[1]
    runner = ModelRunnerCpp.from_dir(engine_dir=str(args.engine), rank=rank, kv_cache_enable_block_reuse=False)
    found = {}
    for index, ids in enumerate(tokens):
        out = runner.generate([ids], max_new_tokens=1, end_id=-1, pad_id=0, return_dict=True)
        if rank == 0:
            found[f"logits.{index}"] = out["context_logits"][0][:, :vocabulary].float().cpu().numpy()
    if rank == 0:
        np.savez(args.output, **found)
    return 0


def compare(args: argparse.Namespace) -> int:
    """Print a line a sequence; exit code 0 if all are within the limit, 3 if not."""
    failed = 0
    with np.load(args.reference) as want, np.load(args.run) as got:
        precision = str(want["precision"])
        print(f"{'sequence':>8} {'tokens':>6} {'rms error':>10} {'PyTorch in ' + precision:>15} {'first choice':>12}")
        for index in range(count(want)):
            exact, engine = want[f"logits.{index}"], got[f"logits.{index}"]
            if engine.shape != exact.shape:
                print(f"{index:8} logits of shape {engine.shape}, expected {exact.shape}")
                failed += 1
                continue
            error, noise = (float(np.sqrt(np.mean((x - exact) ** 2))) for x in (engine, want[f"noise.{index}"]))
            agree = float((engine.argmax(-1) == exact.argmax(-1)).mean())
            print(f"{index:8} {len(exact):6} {error:10.3g} {noise:15.3g} {agree:12.3f}")
            failed += not error <= MULTIPLE * noise
    if precision in ("int8", "int4", "fp8"):
        print("quantised: the distance to the original weights is shown, not judged")
        return 0
    print("parity   " + ("fail" if failed else "pass"))
    return 3 if failed else 0


def count(data: Any) -> int:
    """Number of sequences in a reference file."""
    return sum(name.startswith("tokens.") for name in data.files)


def main() -> int:
    """Run one step; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    for function, options in (
        (reference, ("checkpoint", "precision", "output")),
        (run, ("engine", "reference", "output")),
        (compare, ("reference", "run")),
    ):
        step = steps.add_parser(function.__name__, help=function.__doc__)
        for option in options:
            step.add_argument(f"--{option}", required=True, type=str if option == "precision" else Path)
        step.set_defaults(function=function)
    args = parser.parse_args()
    return int(args.function(args))


if __name__ == "__main__":
    sys.exit(main())
