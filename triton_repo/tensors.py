"""What the rows of the request interface (`triton_repo.interface`) are made of.

Copied into the model repository: it needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODEL, TOKENS, TEXT, BACKEND, PYTORCH = "model", "tokens", "text", "backend", "pytorch"
"""Interfaces: this project's own model, which has every name of the two after it; a tokens model; a text model; TensorRT-LLM's
engine backend; TensorRT-LLM's PyTorch runtime (llmapi)."""
NGPT, TENSORRT_LLM = "ngpt-deploy", "TensorRT-LLM's engine backend"
"""Whose engine a text model asks: this project's scheduler and sampler, or the backend."""
WORD_LIST = (2, -1)
"""The shape of several token sequences in one tensor: their ids, and where each ends."""


@dataclass(frozen=True)
class Tensor:
    """A tensor on the wire: its name, Triton's type without "TYPE_", its shape without the batch (-1: any size)."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Range:
    """Values that are taken: whether one `holds`, how that is `said`, and what else there is to say."""

    holds: Callable[[Any], bool]
    said: str
    remedy: str = ""


@dataclass(frozen=True)
class Input:
    """An input of a request.

    option: its name in this project's client. tokens, text, backend, pytorch: the tensor of that interface, None where it
    has none. older: names that are taken too. sets: the field of SamplingParams it becomes. neutral: the value that asks for
    nothing. range: the values that make sense to any server. only: those that can be served here. asks: whether it chooses
    what is returned. local: the text model itself does it, whatever the engine.
    """

    option: str
    about: str
    tokens: Tensor | None = None
    text: Tensor | None = None
    backend: Tensor | None = None
    pytorch: Tensor | None = None
    required: bool = False
    older: tuple[str, ...] = ()
    sets: str = ""
    neutral: Any = None
    range: Range | None = None
    only: Range | None = None
    asks: bool = False
    local: bool = False

    def of(self, interface: str) -> Tensor | None:
        """The tensor of an interface, by its first name."""
        if interface == MODEL:
            return self.text or self.tokens
        found: Tensor | None = getattr(self, interface)
        return found

    def tensors(self, interface: str) -> tuple[Tensor, ...]:
        """Every tensor by which the interface takes this input: the two of MODEL may differ in type."""
        own = (self.text, self.tokens) if interface == MODEL else (self.of(interface),)
        found = list(dict.fromkeys(tensor for tensor in own if tensor is not None))
        if found and interface in (MODEL, TOKENS, TEXT):
            found += [Tensor(name, found[0].dtype, found[0].dims) for name in self.older]
        return tuple(found)

    def dtype(self) -> str:
        """Triton's type; the same in every interface for what is one value."""
        return next(t.dtype for t in (self.tokens, self.text, self.pytorch) if t is not None)


@dataclass(frozen=True)
class Refused:
    """An input that other servers have. It is declared, because Triton drops without a word what a client sends over HTTP under
    a name that is not, and it is refused by name unless it is `neutral`."""

    tensor: Tensor
    neutral: Any = None
    remedy: str = ""


@dataclass(frozen=True)
class Output:
    """An output, by interface as an input is. when: the input that asks for it. backend: whether TensorRT-LLM's has it."""

    tokens: Tensor | None = None
    text: Tensor | None = None
    pytorch: Tensor | None = None
    when: str = ""
    backend: bool = True

    def of(self, interface: str) -> Tensor | None:
        """The tensor of an interface; the backend's are those of the tokens model."""
        if interface == MODEL:
            return self.text or self.tokens
        if interface == BACKEND:
            return self.tokens if self.backend else None
        found: Tensor | None = getattr(self, interface)
        return found
