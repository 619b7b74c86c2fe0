"""Section `golden`: the PyTorch model on the GPU against the golden float64 logits. Not executed on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpu.machine import require_cuda
from scripts.gpu.report import Row, Unavailable

SECTION = "golden"
FLOAT32_BOUND = 2e-5  # the golden data's own bound on logits in float32


def section(folder: Path, cases: Iterable[str] = ("gqa", "gqa-left-padded", "llama3-rope-bias", "dead-mlp")) -> Iterable[Row]:
    """Logit errors in float32, bfloat16 and float16. Raises Unavailable without a device or transformers."""
    torch = require_cuda()
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield compare(folder / case, dtype, "cuda")


def compare(folder: Path, dtype: Any, device: str) -> Row:
    """One case in one type; only float32 has a bound to be held to, the others must be finite."""
    import torch

    try:
        from transformers import AutoModelForCausalLM

        import ngpt  # noqa: F401
    except ImportError as missing:
        raise Unavailable("transformers is not importable") from missing

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    with np.load(folder / "golden.npz") as data:
        ids, mask, golden = data["input_ids"], data["attention_mask"], data["logits"]
    with torch.no_grad():
        out = model(torch.from_numpy(ids).long().to(device), attention_mask=torch.from_numpy(mask).long().to(device))
    real = mask.astype(bool)
    logits = out.logits.double().cpu().numpy()[real]
    error = np.abs(logits - golden[real])
    same = float((logits.argmax(-1) == golden[real].argmax(-1)).mean())
    bad = not np.isfinite(logits).all() or (dtype == torch.float32 and float(error.max()) > FLOAT32_BOUND)
    name = str(dtype).removeprefix("torch.")
    judged = dtype == torch.float32 or bad
    return Row(
        SECTION,
        f"{folder.name} {name}: largest logit error",
        float(np.nan_to_num(error, nan=np.inf).max()),
        "",
        ("FAILED" if bad else "ok") if judged else "measured",
        f"mean {error.mean():.2e}, logits up to {np.abs(golden[real]).max():.2f}, same first token {same:.1%}",
    )
