"""Running `NGPTForCausalLM` as the reference: through its public class, one sequence at a time, in a chosen precision."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.parity.outputs import Outputs
from ngpt.checkpoint import Checkpoint, save_hf
from ngpt.errors import missing_package

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@contextlib.contextmanager
def loadable_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A temporary Hugging Face folder with this checkpoint as transformers wants it: a converted research file, or links to
    the files.

    Its config is the one that was understood, without what other tools left in the original, and its index is complete.
    """
    with tempfile.TemporaryDirectory(prefix="ngpt-parity-") as scratch:
        folder = Path(scratch) / "checkpoint"
        if not checkpoint.places:
            yield save_hf(checkpoint, folder)
            return
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
        links = {file: f"{number}.safetensors" for number, file in enumerate(checkpoint.files)}
        for file, link in links.items():
            (folder / link).symlink_to(file.resolve())
        weight_map = {name: links[file] for name, file in checkpoint.places.items()}
        index = {"metadata": {"total_size": sum(file.stat().st_size for file in links)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        yield folder


class TorchReference:
    """The PyTorch model in one precision, on the CPU. ``attention`` is transformers' name of an implementation."""

    def __init__(self, folder: Path, precision: str, *, attention: str = "eager") -> None:
        try:
            from ngpt import NGPTForCausalLM
        except ImportError as error:
            raise missing_package("the parity check needs torch and transformers", "torch", found=str(error)) from error
        dtype = DTYPES[precision]
        self.precision = precision
        with _quiet_loading():
            # A configuration may ask for tuples, which are not what is compared here.
            kinds = {"dtype": dtype, "attn_implementation": attention, "return_dict": True}
            self.model: Any = NGPTForCausalLM.from_pretrained(folder, **kinds)
        self.model.eval()
        if dtype == torch.float64:
            self.model.double()  # transformers keeps some vectors in float32; widening them is exact

    def run(self, tokens: tuple[int, ...]) -> Outputs:
        """Logits [T, V] and hidden states after the embedding and after every half layer, wide enough to be exact."""
        wide = torch.float64 if self.precision == "float64" else torch.float32
        ids = torch.tensor([tokens], dtype=torch.int64)
        with torch.no_grad(), _recorded(self.model) as recorded:
            output = self.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        taps = {name: value[0].to(wide).numpy() for name, value in recorded.items()}
        for index, hidden in enumerate(output.hidden_states):
            name = "embed" if index == 0 else f"layers.{index - 1}.mlp.update"
            taps[name] = hidden[0].to(wide).numpy()
        logits = output.logits[0].to(wide).numpy()
        return Outputs(np.ascontiguousarray(logits), taps)

    def continue_greedily(self, tokens: list[int], steps: int) -> list[int]:
        """The model's own next ``steps`` tokens; an end-of-sequence token does not stop it."""
        from transformers import DynamicCache

        from ngpt.layers import CACHE  # its name in the installed transformers, which complains of the other

        fed, out = torch.tensor([tokens], dtype=torch.int64), []
        past = {CACHE: DynamicCache(config=self.model.config)}
        with torch.no_grad():
            for _ in range(steps):
                output = self.model(input_ids=fed, use_cache=True, logits_to_keep=1, **past)
                fed = output.logits[:, -1].argmax(-1, keepdim=True)
                out.append(int(fed))
        return out


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bar of transformers' own: progress is the caller's to show."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _recorded(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Hidden states between attention and MLP: the input of every layer's MLP, [1, T, E]."""
    seen: dict[str, torch.Tensor] = {}

    def recorder(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def record(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = inputs[0].detach()

        return record

    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):
            handle = layer.mlp.register_forward_pre_hook(recorder(f"layers.{index}.attn.update"))
            hooks.callback(handle.remove)
        yield seen
