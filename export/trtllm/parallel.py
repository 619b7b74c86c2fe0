"""How a network is divided among GPUs: `tp` ways within a layer, `pp` ways along the layers."""

from __future__ import annotations

from dataclasses import dataclass

from ngpt.errors import UnsupportedError
from ngpt.spec import NGPTSpec


@dataclass(frozen=True)
class Parallel:
    """World rank = stage * tp + tp_rank, as in `tensorrt_llm.mapping.Mapping` (tensorrt_llm/mapping.py at commit 05ebebb2)."""

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for name, value in (("tp", self.tp), ("pp", self.pp)):
            if value < 1:
                raise UnsupportedError(f"--{name}", expected="at least 1", found=str(value))

    @property
    def world(self) -> int:
        """Number of GPUs."""
        return self.tp * self.pp

    def check(self, spec: NGPTSpec) -> None:
        """Raise UnsupportedError, naming the size, where the network cannot be divided so."""
        heads, keys = spec.num_heads, spec.num_kv_heads
        wrong = ""
        if heads % self.tp:
            wrong, expected, found = "num_attention_heads", f"a multiple of --tp {self.tp}", heads
        elif keys % self.tp and self.tp % keys:
            wrong, expected, found = "num_key_value_heads", f"a multiple or a divisor of --tp {self.tp}", keys
        elif spec.intermediate_size % self.tp:
            wrong, expected, found = "intermediate_size", f"a multiple of --tp {self.tp}", spec.intermediate_size
        elif self.pp > spec.num_layers:
            wrong, expected, found = "num_hidden_layers", f"at least --pp {self.pp}", spec.num_layers
        if wrong:
            raise UnsupportedError(f"{wrong} and parallelism", expected=expected, found=str(found), remedy="choose others")

    def layers(self, stage: int, num_layers: int) -> range:
        """Layers of a stage; where pp does not divide them, the first stages take one more (`Mapping.pp_layers`)."""
        each, more = divmod(num_layers, self.pp)
        start = stage * each + min(stage, more)
        return range(start, start + each + (stage < more))

    def query_heads(self, tp_rank: int, heads: int) -> range:
        """Query heads of a tensor-parallel rank."""
        each = heads // self.tp
        return range(tp_rank * each, (tp_rank + 1) * each)

    def key_heads(self, tp_rank: int, keys: int) -> range:
        """Key heads of a tensor-parallel rank: those its query heads read. With more ranks than heads several hold the same."""
        each = max(1, keys // self.tp)
        first = tp_rank * keys // self.tp
        return range(first, first + each)
