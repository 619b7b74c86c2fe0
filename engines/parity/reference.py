"""The PyTorch model as the reference, a layer at a time: no more of it is in memory than one layer and a block of the head.

Teacher-forced sequences need no step after another: all of them go through a layer before the next one is read, and through
every variant of it (the wide one, one with quantised weights, the noise). The layers are those of `ngpt.layers`, the logits
are equal to the bit to `NGPTForCausalLM`'s (tests/parity/test_reference.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.parity.scratch import Scratch
from engines.parity.weights import Change, changed
from ngpt.checkpoint import Checkpoint
from ngpt.errors import missing_package
from ngpt.progress import Progress, silent
from ngpt.tensor_names import EMBED, LM_HEAD, SZ

if TYPE_CHECKING:
    import torch

_HEAD_BLOCK = 8192  # rows of the head at a time
_ALIGNMENT = 64  # bytes, as memory of torch's own has
_FLOAT32_ALWAYS = ("attn_alpha", "mlp_alpha")  # as `NGPTPreTrainedModel._keep_in_fp32_modules_strict` has it

Taps = Mapping[str, NDArray[np.floating]]
OnTaps = Callable[[int, Mapping[str, Taps]], None]
"""(index of the sequence, variant -> tap name -> [T, n]), once a layer, and once for the embedding."""


@dataclass(frozen=True)
class Variant:
    """One way of running the model.

    ``precision``: a dtype's name. ``attention``: transformers' name of an implementation. ``change``: what happens to the
    weights before they are used. ``round_input``: what happens to the input [..., n] of every matrix that is changed. ``tapped``:
    whether its values are handed out.
    """

    name: str
    precision: str
    attention: str = "eager"
    change: Change | None = None
    round_input: Callable[[torch.Tensor], torch.Tensor] | None = None
    tapped: bool = False


def run_reference(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    variants: Sequence[Variant],
    *,
    scratch: Scratch | None = None,
    on_taps: OnTaps | None = None,
    progress: Progress = silent,
) -> dict[str, list[NDArray[np.floating]]]:
    """The logits [T, V] of each sequence by each variant's name: float64 for the variant of that precision, else float32.

    Args:
        checkpoint: open; every tensor is read once for all variants.
        sequences: token ids, one list a sequence.
        variants: those of one `change` should be neighbours.
        scratch: where large arrays lie; in memory unless given.
        on_taps: gets the values of the tapped variants, while a layer is worked on.
        progress: called with what is being done and the part that is done.

    Raises:
        MissingPackageError: torch or transformers is not installed.
    """
    try:
        model = _Model(checkpoint)
    except ImportError as error:
        raise missing_package("the parity check needs torch and transformers", "torch", found=str(error)) from error
    return model.run(sequences, variants, scratch or Scratch(), on_taps, progress)


class _Model:
    """What all variants share. torch is imported here: whoever only reads a report needs none."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from ngpt import NGPTConfig
        from ngpt.layers import NGPTDecoderLayer, NGPTRotaryEmbedding, ResearchPositionCode

        self.layer_class = NGPTDecoderLayer
        self.position_classes = {"rope": NGPTRotaryEmbedding, "research": ResearchPositionCode}
        self.checkpoint, self.spec = checkpoint, checkpoint.spec
        self.config_of = lambda attention: NGPTConfig(**checkpoint.config, attn_implementation=attention)
        self.stored = set(checkpoint.names())

    def run(
        self,
        sequences: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        scratch: Scratch,
        on_taps: OnTaps | None,
        progress: Progress,
    ) -> dict[str, list[NDArray[np.floating]]]:
        import torch

        with torch.no_grad():
            runs = [_Run(self, variant, sequences) for variant in variants]
            _hand_out(on_taps, runs, {run.variant.name: [{"embed": run.shown(h)} for h in run.hidden] for run in runs})
            steps = self.spec.num_layers + max(1, self.spec.vocab_size // _HEAD_BLOCK)
            for index in range(self.spec.num_layers):
                seen: dict[str, list[Taps]] = {}
                progress(f"PyTorch, layer {index + 1} of {self.spec.num_layers}", index / steps)
                for state, run in self._states(runs, f"model.layers.{index}."):
                    seen[run.variant.name] = run.layer(index, state, on_taps is not None)
                _hand_out(on_taps, runs, seen)
            layers = self.spec.num_layers / steps
            return self._logits(runs, scratch, lambda part: progress("PyTorch, the head", layers + (1 - layers) * part))

    def _states(self, runs: Sequence[_Run], prefix: str) -> Iterator[tuple[dict[str, torch.Tensor], _Run]]:
        """The layer's tensors as each run wants them; runs of one change share the work, and those of one type the memory."""
        names = [name for name in self.stored if name.startswith(prefix)]
        for change, group in itertools.groupby(runs, key=lambda run: run.variant.change):
            tensors = {name.removeprefix(prefix): changed(name, self.checkpoint.get(name), change) for name in names}
            states: dict[Any, dict[str, torch.Tensor]] = {}
            for run in group:
                if run.dtype not in states:
                    states[run.dtype] = {name: run.cast(tensor, name) for name, tensor in tensors.items()}
                yield states[run.dtype], run

    def _logits(
        self, runs: Sequence[_Run], scratch: Scratch, tick: Callable[[float], None]
    ) -> dict[str, list[NDArray[np.floating]]]:
        vocabulary = self.spec.vocab_size
        out: dict[str, list[NDArray[np.floating]]] = {
            run.variant.name: [scratch.array((h.shape[1], vocabulary), run.shown_dtype) for h in run.hidden] for run in runs
        }
        table = self.checkpoint.get(LM_HEAD if LM_HEAD in self.stored else EMBED)
        scales = self.checkpoint.get(SZ) if SZ in self.stored else None
        for start in range(0, vocabulary, _HEAD_BLOCK):
            rows = slice(start, min(start + _HEAD_BLOCK, vocabulary))
            for change, group in itertools.groupby(runs, key=lambda run: run.variant.change):
                block = changed(LM_HEAD, table[rows], change, first_row=start)
                for run in group:
                    weight, sz = run.cast(block), None if scales is None else run.cast(scales[rows])
                    for index, logits in enumerate(run.head(weight, sz)):
                        out[run.variant.name][index][:, rows] = logits
            tick(rows.stop / vocabulary)
        return out


class _Run:
    """A variant's hidden states [1, T, E] of every sequence, carried from layer to layer."""

    def __init__(self, model: _Model, variant: Variant, sequences: Sequence[Sequence[int]]) -> None:
        import torch
        from transformers.masking_utils import create_causal_mask

        from ngpt.layers import CACHE

        self.model, self.variant = model, variant
        self.dtype = getattr(torch, variant.precision)
        self.shown_dtype = np.dtype("float64" if variant.precision == "float64" else "float32")
        self.config = model.config_of(variant.attention)
        position_code = model.position_classes[self.config.position_code](self.config)
        table = model.checkpoint.get(EMBED)
        self.hidden, self.context = [], []
        for tokens in sequences:
            rows = table[torch.tensor(tokens, dtype=torch.int64)]
            if variant.change is not None:
                rows = variant.change.embedding(rows)
            h = rows.to(self.dtype)[None]
            positions = torch.arange(len(tokens))[None]
            mask = create_causal_mask(
                config=self.config, inputs_embeds=h, attention_mask=None, position_ids=positions, **{CACHE: None}
            )
            self.hidden.append(h)
            self.context.append(
                {"position_embeddings": position_code(h, positions), "attention_mask": mask, "position_ids": positions}
            )

    def cast(self, tensor: torch.Tensor, name: str = "") -> torch.Tensor:
        """In the run's type, and in memory of its own: some kernels sum in another order where data is not aligned."""
        import torch

        half = self.dtype in (torch.float16, torch.bfloat16)
        dtype = torch.float32 if half and name in _FLOAT32_ALWAYS else self.dtype
        return tensor.to(dtype, copy=tensor.data_ptr() % _ALIGNMENT != 0 or not tensor.is_contiguous())

    def shown(self, tensor: torch.Tensor) -> NDArray[np.floating]:
        """[1, T, n] as [T, n], wide enough to be exact."""
        wide = tensor[0] if self.variant.precision == "float64" else tensor[0].float()
        array: NDArray[np.floating] = wide.numpy()
        return array

    def layer(self, index: int, state: Mapping[str, torch.Tensor], taps: bool) -> list[Taps]:
        """Move every sequence through the layer; what is between, by tap name, of each."""
        import torch

        with torch.device("meta"):
            layer = self.model.layer_class(self.config, index).eval()
        layer.load_state_dict(state, assign=True)
        seen: dict[str, torch.Tensor] = {}
        if taps and self.variant.tapped:
            _record(layer, f"layers.{index}", seen)
        self._round_inputs(layer, f"model.layers.{index}.")
        found: list[Taps] = []
        for number, (h, context) in enumerate(zip(self.hidden, self.context, strict=True)):
            self.hidden[number] = layer(h, **context)
            if seen:
                seen[f"layers.{index}.mlp.update"] = self.hidden[number]
            found.append({name: self.shown(value) for name, value in seen.items()})
        return found

    def _round_inputs(self, layer: Any, prefix: str) -> None:
        rounded, change = self.variant.round_input, self.variant.change
        if rounded is None or change is None:
            return
        for name, module in layer.named_modules():
            if change.applies(prefix + name):
                module.register_forward_pre_hook(lambda _module, inputs: (rounded(inputs[0]), *inputs[1:]))

    def head(self, weight: torch.Tensor, sz: torch.Tensor | None) -> Iterator[NDArray[np.floating]]:
        """Logits [T, n] of a block of the head's rows, for every sequence (paper section 2.1)."""
        from torch.nn.functional import linear

        change = self.variant.change
        scale = self.config.sz_init_value / self.config.initializer_range
        for h in self.hidden:
            if self.variant.round_input is not None and change is not None and change.applies("lm_head"):
                h = self.variant.round_input(h)
            logits = linear(h, weight)
            if sz is not None:
                logits = logits * (linear(h.new_ones(1), sz) * scale)
            yield self.shown(logits)


def _record(layer: Any, name: str, seen: dict[str, torch.Tensor]) -> None:
    """Put every value that has a tap's name into `seen`, [1, T, n]."""

    def keep(tap: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def before(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[f"{name}.{tap}"] = inputs[0]

        return before

    def result(tap: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def after(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
            seen[f"{name}.{tap}"] = output

        return after

    attention, mlp = layer.self_attn, layer.mlp
    original = attention.queries_keys_values

    def queries_keys_values(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = original(*args)
        for tap, value in zip(("q_scaled", "k_norm", "v"), found, strict=True):
            seen[f"{name}.attn.{tap}"] = value.transpose(1, 2).flatten(2)
        return found

    attention.queries_keys_values = queries_keys_values
    attention.o_proj.register_forward_pre_hook(keep("attn.out"))
    attention.o_proj.register_forward_hook(result("attn.o"))
    mlp.register_forward_pre_hook(keep("attn.update"))
    mlp.down_proj.register_forward_pre_hook(keep("mlp.act"))
    mlp.down_proj.register_forward_hook(result("mlp.down"))


def _hand_out(on_taps: OnTaps | None, runs: Sequence[_Run], seen: Mapping[str, Sequence[Taps]]) -> None:
    if on_taps is None:
        return
    tapped = [run.variant.name for run in runs if run.variant.tapped]
    for index in range(len(runs[0].hidden)):
        on_taps(index, {name: seen[name][index] for name in tapped})
