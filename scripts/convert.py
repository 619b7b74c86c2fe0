"""`ngpt-deploy convert`: a checkpoint of either format as a Hugging Face folder, exactly, or projected back onto the unit
sphere."""

from pathlib import Path
from typing import Any

from engines.parity.effect import logit_effect
from ngpt.checkpoint import Change, fold_scales, normalize, open_checkpoint, save_hf
from ngpt.progress import Progress, part_of, silent


def run(
    checkpoint: str | Path,
    output: str | Path,
    *,
    fold: bool = False,
    project: bool = False,
    with_code: bool = False,
    progress: Progress = silent,
    **opening: Any,
) -> None:
    """Convert, and print what was done. `opening`: options of `open_checkpoint`. Raises the errors of reading and writing
    checkpoints."""
    with open_checkpoint(checkpoint, **opening) as original:
        wanted, changes = normalize(original, part_of(progress, 0.0, 0.3)) if project else (original, [])
        if fold:
            result = fold_scales(wanted)  # which validates what it folds
        else:
            wanted.validate(part_of(progress, 0.3, 0.6))
            result = wanted
        wanted.report_notes()
        save_hf(result, output, with_code=with_code, progress=part_of(progress, 0.6, 1.0))
        print(f"checkpoint {output}")
        if not project:
            return
        print("\n".join(table(changes)))
        if changes:
            with open_checkpoint(output) as written:
                print(f"logits   {logit_effect(original, written)}")


def table(changes: list[Change]) -> list[str]:
    """Lines that say what projecting did to each tensor."""
    if not changes:
        return ["normalize  nothing to do: every vector is on the unit sphere already"]
    width = max(len(change.name) for change in changes)
    lines = [f"{'tensor':<{width}}  {'scaled':>15}  {'norms before':>21}  {'change of the tensor':>20}"]
    for change in changes:
        norms = f"{change.lowest:.6g} to {change.highest:.6g}"
        lines.append(f"{change.name:<{width}}  {change.vectors:>6} of {change.of:<5}  {norms:>21}  {change.relative:>20.3g}")
    return lines
