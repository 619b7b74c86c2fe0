"""TensorRT-RTX on this machine: importable or not, and nothing more yet."""

from __future__ import annotations

from collections.abc import Iterable

from scripts.gpu.report import Row, Unavailable


def section() -> Iterable[Row]:
    """Rows about TensorRT-RTX. Raises Unavailable: the package is not importable, or the section is not written."""
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise Unavailable("tensorrt_rtx is not importable") from error
    raise Unavailable(f"tensorrt_rtx {tensorrt_rtx.__version__} is importable; this section is not written yet")
