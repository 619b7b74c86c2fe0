"""The two kernels as Python sees them: the macros a size is compiled with, the launch geometry, the argument order.

A kernel is compiled for one network: sizes, eps and storage type are macros, the number of tokens is an argument. The
arguments follow TensorRT's convention for ahead-of-time plugins: inputs, 32-bit integers, outputs.
Contract-tested and executed in emulation on the CPU; not executed on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ngpt.errors import UnsupportedError

Dtype = Literal["float32", "float16", "bfloat16"]
ITEM_SIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
ACCESS = 16  # bytes of the widest load and store
MOST_THREADS = 512
MOST_CHANNELS = 40  # of one row that a thread may hold: more would spill registers to memory
# Threads of a multiprocessor that the registers must suffice for. Left to itself, the assembler spills a few registers for the
# sake of more; with 1280 it does not, and at 4096 bfloat16 channels they have 80 KiB of loads in flight.
RESIDENT_THREADS = 1280
BLOCK = 128  # threads of a block whose rows share it


@dataclass(frozen=True)
class HypersphereUpdate:
    """norm(h + lr * (norm(x, eps) - h)) over rows of `size` channels.

    Arguments: h, x [rows, size] of `dtype`, lr float32 [size], rows int32; out [rows, size] of `dtype`.
    Raises UnsupportedError for a size that is not a positive multiple of 8 or too large for a block's registers, an eps
    outside [0, 1), or an unknown dtype.
    """

    size: int
    eps: float
    dtype: Dtype
    name: ClassVar[str] = "hypersphere_update"
    parameters: ClassVar[tuple[str, ...]] = ("u64", "u64", "u64", "u32", "u64")

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        most = MOST_CHANNELS * MOST_THREADS
        if self.size <= 0 or self.size % 8 or self.size > most:
            raise UnsupportedError(
                "hidden size of the hypersphere_update kernel", expected=f"a multiple of 8 up to {most}", found=str(self.size)
            )
        if not 0 <= self.eps < 1:
            raise UnsupportedError("eps of the hypersphere_update kernel", expected="0 or more, below 1", found=repr(self.eps))

    @property
    def block(self) -> tuple[int, int]:
        """(threads of a row, rows of a block).

        Up to 128 accesses a row fits one warp, which needs no barrier. A longer one gets two accesses a thread: at 4096
        bfloat16 channels that is 256 threads with four 16-byte loads each in flight, and several such blocks fit a
        multiprocessor.
        """
        vectors = self.size * ITEM_SIZE[self.dtype] // ACCESS
        if vectors <= 128:
            threads = min(32, _power_of_two(vectors))
            return threads, BLOCK // threads
        return min(MOST_THREADS, 32 * -(-vectors // 64)), 1

    @property
    def macros(self) -> dict[str, str]:
        """What the source is compiled with."""
        threads, rows = self.block
        per_thread = -(-self.size * ITEM_SIZE[self.dtype] // (ACCESS * threads)) * (ACCESS // ITEM_SIZE[self.dtype])
        resident = RESIDENT_THREADS // (threads * rows) if per_thread <= 16 else 1
        return {"SIZE": str(self.size), "EPS": f"{self.eps!r}f", **_common(self.dtype, threads, rows, resident)}

    def grid(self, rows: int) -> int:
        """Blocks of a launch over `rows` rows."""
        return -(-rows // self.block[1])


@dataclass(frozen=True)
class QKNorm:
    """Rotary embedding of the first `rotary_dim` channels, l2 norm of each head, a scale on q alone.

    Arguments: qk [tokens, (heads + kv_heads) * head_dim] of `dtype`, cos and sin float32 [length, rotary_dim / 2], positions
    int32 [tokens], q_scale float32 [heads * head_dim]; tokens, sequence and length int32; q [batch, heads, sequence,
    head_dim] and k [batch, kv_heads, sequence, head_dim] of `dtype`. Raises UnsupportedError for a head_dim that is not a
    multiple of 8 up to 256, a rotary_dim that is odd, not positive or larger than head_dim, or no heads.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: Dtype
    name: ClassVar[str] = "qk_norm"
    parameters: ClassVar[tuple[str, ...]] = ("u64",) * 5 + ("u32",) * 3 + ("u64",) * 2

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        if self.heads < 1 or self.kv_heads < 1:
            raise UnsupportedError("heads of the qk_norm kernel", expected="1 or more", found=f"{self.heads}, {self.kv_heads}")
        if not 0 < self.head_dim <= 256 or self.head_dim % 8:
            raise UnsupportedError(
                "head_dim of the qk_norm kernel", expected="a multiple of 8 up to 256", found=str(self.head_dim)
            )
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise UnsupportedError(
                "rotary_dim of the qk_norm kernel", expected=f"even, from 2 to {self.head_dim}", found=str(self.rotary_dim)
            )

    @property
    def width(self) -> int:
        """Channels of one access: the widest that divides both halves of the rotated part."""
        width = ACCESS // ITEM_SIZE[self.dtype]
        while self.rotary_dim // 2 % width:
            width //= 2
        return width

    @property
    def block(self) -> tuple[int, int]:
        """(threads of a head, heads of a block)."""
        threads = min(32, _power_of_two(-(-self.head_dim // (2 * self.width))))
        return threads, BLOCK // threads

    @property
    def macros(self) -> dict[str, str]:
        """What the source is compiled with."""
        sizes = {"HEADS": self.heads, "KV_HEADS": self.kv_heads, "HEAD_DIM": self.head_dim, "ROTARY": self.rotary_dim}
        threads, rows = self.block
        common = _common(self.dtype, threads, rows, RESIDENT_THREADS // (threads * rows))
        return {name: str(value) for name, value in (sizes | {"WIDTH": self.width}).items()} | common

    def grid(self, tokens: int) -> int:
        """Blocks of a launch over `tokens` tokens."""
        return -(-tokens * (self.heads + self.kv_heads) // self.block[1])


Kernel = HypersphereUpdate | QKNorm


def _common(dtype: Dtype, threads: int, rows: int, resident: int) -> dict[str, str]:
    return {"STORAGE": dtype.upper(), "ROW_THREADS": str(threads), "ROWS": str(rows), "RESIDENT": str(resident)}


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _check_dtype(dtype: str, known: Sequence[str] = tuple(ITEM_SIZE)) -> None:
    if dtype not in known:
        raise UnsupportedError("storage type of a kernel", expected=", ".join(known), found=str(dtype))
