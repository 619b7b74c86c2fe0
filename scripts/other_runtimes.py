#!/usr/bin/env python3
"""Engine folders in tools that this project's environment cannot hold: optimum-onnx, transformers.js, onnxruntime-node and -web.

Makes an environment for each (a virtual environment, and npm packages without their install scripts), gives each tool the
folders as they lie there, compares greedy tokens with this project's own engine row by row, and prints a table. Needs node,
npm and the registries.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RUNTIMES = ROOT / "scripts" / "runtimes"
TINY, GOLDEN = ROOT / "examples" / "ngpt-tiny", ROOT / "tests" / "golden"
NEW_TOKENS = 24
TEXTS = ("def main():", "import os\n\nclass Stack(object):", "for")
FUSED = ("cpu-fp32", "cpu-int8", "cpu-int4")


@dataclass(frozen=True)
class Case:
    """An engine, prompts of token ids, and what is to come of them: this project's tokens, or a refusal (None)."""

    name: str
    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]] | None
    text: str | None = None
    text_ids: list[int] | None = None

    def job(self) -> dict[str, Any]:
        """The case as a tool gets it, its prompts padded on the left to one length."""
        length = max(map(len, self.prompts))
        return {
            "folder": str(self.folder),
            "ids": [[0] * (length - len(p)) + p for p in self.prompts],
            "mask": [[0] * (length - len(p)) + [1] * len(p) for p in self.prompts],
            "new_tokens": NEW_TOKENS,
            "text": self.text,
        }

    def verdict(self, result: dict[str, Any]) -> str:
        """What the tool made of it; "equal" and "refused" are as they should be."""
        if "error" in result:
            # WebAssembly's errors leave the node's name out, which speaks of the attention_mask.
            meant = any(word in result["error"] for word in ("attention_mask", "ReshapeHelper"))
            return "refused" if self.expected is None and meant else f"ERROR {result['error'][:300]}"
        if self.expected is None:
            return "WRONG: answers"
        if result["tokens"] != self.expected:
            same = sum(a == b for a, b in zip(result["tokens"], self.expected, strict=True))
            return f"WRONG: {same} of {len(self.expected)} rows equal"
        return "equal" if result.get("text_ids", self.text_ids) == self.text_ids else "WRONG: other ids of a text"


def cases(work: Path) -> Iterator[Case]:
    """Every engine that is to be tried, built under `work`."""
    import engines.backends.onnx
    from engines import load_engine
    from engines.build import build_engine

    def made(
        name: str, checkpoint: Path, target: str, prompts: list[list[int]], *, refused: bool = False, text: str = ""
    ) -> Case:
        folder = work / f"{name} {target}".replace(" ", "-")
        build_engine(checkpoint, target, folder, verify=False)
        with load_engine(folder, threads=1) as engine:
            expected = [engine.generate([p], max_new_tokens=NEW_TOKENS, ignore_eos=True)[0] for p in prompts]
            ids = engine.tokenizer.encode(text) if text else None
        return Case(f"{name}, {target}", folder, prompts, None if refused else expected, text or None, ids)

    ids = _prompts()
    for target in ("onnx-portable", *FUSED):
        yield made("example", TINY, target, ids[:1], text=TEXTS[1])
    half = build_engine(TINY, "cuda-fp16", work / "half", verify=False)
    yield Case("example, cuda-fp16 (on the CPU)", half, ids[:1], made("example again", TINY, "cpu-fp32", ids[:1]).expected)
    yield made("example left-padded", TINY, "onnx-portable", ids)
    for target in FUSED:
        yield made("example left-padded", TINY, target, ids, refused=True)
    ragged, even = [[17, 98, 33, 7, 45], [5, 80], [201, 9, 9]], [[17, 98, 33], [5, 80, 4]]
    yield made("research checkpoint left-padded", GOLDEN / "research-checkpoint", "onnx-portable", ragged)
    for name, changes in VARIANTS.items():
        checkpoint = _random_checkpoint(work / f"{name}-checkpoint".replace(" ", "-"), changes)
        yield made(f"{name} left-padded", checkpoint, "onnx-portable", ragged)
        yield made(name, checkpoint, "cpu-fp32", even)
    try:
        limit, engines.backends.onnx.EXTERNAL_DATA_FROM = engines.backends.onnx.EXTERNAL_DATA_FROM, 0
        for target in ("onnx-portable", "cpu-int8"):
            yield made("weights in a file", TINY, target, ids[:1])
    finally:
        engines.backends.onnx.EXTERNAL_DATA_FROM = limit


VARIANTS: dict[str, dict[str, Any]] = {
    "one key head and wide heads": {"num_key_value_heads": 1, "head_dim": 24},
    "heads of 12": {"head_dim": 12, "hidden_size": 72},
    "tied with several end tokens": {"tie_word_embeddings": True, "eos_token_id": [2, 7], "pad_token_id": None},
    "multi-head": {"num_key_value_heads": 4},
}


def _random_checkpoint(folder: Path, changes: dict[str, Any]) -> Path:
    import torch

    from ngpt import NGPTConfig, NGPTForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
    }
    NGPTForCausalLM(NGPTConfig(**(sizes | changes))).save_pretrained(folder)
    return folder


def _prompts() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def environments(work: Path) -> dict[str, list[str]]:
    """Install the tools; returns each one's command, to which the file of jobs is appended or put in for JOBS."""
    venv, js = work / "optimum", work / "js"
    if not (venv / "bin" / "optimum-cli").exists():
        # torch first and pinned, as in the Makefile: as a dependency it would bring gigabytes of CUDA libraries.
        torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
        _run([sys.executable, "-m", "venv", str(venv)])
        pip = [str(venv / "bin" / "pip"), "install", "-q", "--disable-pip-version-check"]
        _run([*pip, torch])
        _run([*pip, "optimum-onnx==0.1.*", "onnxruntime==1.32.*"])
    js.mkdir(exist_ok=True)
    for file in ("package.json", "transformers_js.mjs", "onnxruntime_js.mjs"):
        shutil.copyfile(RUNTIMES / file, js / file)
    # Without the scripts of packages: onnxruntime-node's fetches CUDA libraries.
    _run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=js)
    return {
        "optimum-onnx": [str(venv / "bin" / "python"), str(RUNTIMES / "optimum_onnx.py"), "JOBS"],
        "transformers.js": ["node", str(js / "transformers_js.mjs"), "JOBS"],
        "onnxruntime-node": ["node", str(js / "onnxruntime_js.mjs"), "JOBS", "onnxruntime-node"],
        "onnxruntime-web": ["node", str(js / "onnxruntime_js.mjs"), "JOBS", "onnxruntime-web"],
    }


def _run(command: list[str], cwd: Path | None = None) -> str:
    """Standard output of a command; one that fails ends the script with what it said."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def main() -> int:
    """Run every tool on every case; returns 1 if one is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--environments", type=Path, help="keep the tools in this folder, for the next run (default: they are removed)"
    )
    parser.add_argument("--tool", action="append", help="one of the tools, several times if wanted (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.environments or Path(scratch)
        place.mkdir(parents=True, exist_ok=True)
        commands = environments(place.absolute())
        wanted = [name for name in commands if not arguments.tool or name in arguments.tool]
        tried = list(cases(Path(scratch)))
        jobs = Path(scratch) / "jobs.json"
        jobs.write_text(json.dumps([case.job() for case in tried]))
        good = True
        for name in wanted:
            answer = json.loads(_run([part.replace("JOBS", str(jobs)) for part in commands[name]]).splitlines()[-1])
            print(f"\n{answer['version']}")
            for case, result in zip(tried, answer["results"], strict=True):
                verdict = case.verdict(result)
                good = good and verdict in ("equal", "refused")
                print(f"  {case.name:52} {verdict}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
