"""Greedy tokens by optimum's ORTModelForCausalLM, in an environment of its own: python optimum_onnx.py JOBS.json. See
../other_runtimes.py."""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job's tokens, with and without IO binding, and the ids of its text."""
    ids, mask = torch.tensor(job["ids"]), torch.tensor(job["mask"])
    found = []
    for bound in (False, True):
        model = ORTModelForCausalLM.from_pretrained(job["folder"], use_io_binding=bound)
        new = job["new_tokens"]
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        found.append(out[:, ids.shape[1] :].tolist())
    if found[0] != found[1]:
        return {"error": "IO binding changes the tokens"}
    if job["text"] is None:
        return {"tokens": found[0]}
    return {"tokens": found[0], "text_ids": AutoTokenizer.from_pretrained(job["folder"])(job["text"]).input_ids}


def main() -> None:
    """Answer every job, a refused one with its error."""
    results: list[dict[str, Any]] = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            results.append(run(job))
        except Exception as error:
            results.append({"error": str(error)})
    names = ("optimum-onnx", "transformers", "onnxruntime")
    print(json.dumps({"version": ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names), "results": results}))


if __name__ == "__main__":
    main()
