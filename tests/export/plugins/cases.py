"""Sizes the kernels are tested at: odd shapes, both sides of a warp, multi-query and grouped heads, partial rotation."""

from export.plugins.kernels import ITEM_SIZE, HypersphereUpdate, QKNorm

SIZES = (8, 24, 192, 1032, 4096, 5120)
# heads, kv_heads, head_dim, rotary_dim
HEADS = ((4, 2, 64, 64), (8, 1, 128, 128), (4, 1, 40, 20), (2, 1, 256, 256), (4, 4, 8, 2), (3, 1, 72, 36), (2, 2, 128, 32))

UPDATES = [HypersphereUpdate(size, eps, dtype) for dtype in ITEM_SIZE for size, eps in zip(SIZES, (0.0, 1e-6) * 3, strict=True)]
UPDATES += [HypersphereUpdate(64, 1e-6, dtype) for dtype in ITEM_SIZE]
NORMS = [QKNorm(*heads, dtype) for dtype in ITEM_SIZE for heads in HEADS]


def label(kernel):
    """A test id."""
    numbers = [str(value) for value in vars(kernel).values()]
    return "-".join([kernel.name, *numbers])
