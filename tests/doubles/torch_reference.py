"""The whole PyTorch model in memory, loaded by transformers: what the streamed reference is held against, and what doubles of
engines are made of. No double itself."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engines.parity.quantized import round_to_int8
from ngpt import NGPTForCausalLM
from ngpt.checkpoint import Checkpoint, save_hf

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
        dtype = DTYPES[precision]
        self.precision = precision
        with _quiet_loading():
            # A configuration may ask for tuples, which are not what is compared here.
            kinds = {"dtype": dtype, "attn_implementation": attention, "return_dict": True}
            self.model: Any = NGPTForCausalLM.from_pretrained(folder, **kinds)
        self.model.eval()
        for parameter in self.model.parameters():
            # Out of the mapped file: some kernels sum in another order where data is not aligned.
            parameter.data = parameter.data.clone()
        if dtype == torch.float64:
            self.model.double()  # transformers keeps some vectors in float32; widening them is exact

    def run(self, tokens: tuple[int, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
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
        return np.ascontiguousarray(logits), taps

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


def put_quantized_weights(model, quantization):
    """Replace the weights of every module that the quantisation applies to, in place."""
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not quantization.applies(name):
            continue
        rounded = quantization.round_trip(name, module.weight.detach().float().numpy())
        fresh = torch.from_numpy(np.array(rounded)).to(module.weight.dtype)
        if embedding is not None and module.weight is embedding.weight:
            module.weight = nn.Parameter(fresh)  # a tied head is quantised, the table that it shared is not
        else:
            module.weight.data.copy_(fresh)
    if quantization.narrow_embedding and embedding is not None:  # after the head, which may share the table
        embedding.weight.data.copy_(embedding.weight.half())


def quantize_activations(model, quantization):
    """Make every quantised module round its input to int8 in blocks of ``activation_block``, as integer kernels do."""
    block = quantization.activation_block

    def round_input(_module, inputs):
        return (round_to_int8(inputs[0], block or inputs[0].shape[-1]), *inputs[1:])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and quantization.applies(name):
            module.register_forward_pre_hook(round_input)
