"""The kernels as TensorRT plugins: `ngpt::hypersphere_update` and `ngpt::qk_norm`, whose PTX TensorRT embeds in the engine.

They are quickly deployable plugins with an ahead-of-time implementation (`tensorrt.plugin`, TensorRT 10.14 and 11): an engine
built with them needs neither this package nor Python. TensorRT launches such a kernel with its input pointers in order, then the
extra integer arguments, then its output pointers ("located after the tensor inputs and before the tensor outputs",
documentation of `tensorrt.plugin.aot_impl`; sample quickly_deployable_plugins of NVIDIA/TensorRT); its docstring adds that
attributes are not serialised, so eps and every size are compiled into the PTX. Integer arguments are 32 bits wide (`SymInt32`).

Contract-tested with TensorRT's own Python code; not executed on TensorRT.
"""

# Annotations must be the objects themselves: tensorrt.plugin checks them, and does not resolve strings.
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, get_args

from export.plugins.compile import compile_ptx
from export.plugins.kernels import Dtype, HypersphereUpdate, Kernel, QKNorm
from ngpt.errors import BuildError, UnsupportedError, missing_package


def hypersphere_update(network: Any, h: Any, x: Any, lr: Any, *, eps: float, architecture: int = 80) -> Any:
    """Add norm(h + lr * (norm(x, eps) - h)) to an INetworkDefinition; returns the ITensor, of the shape and type of h.

    h and x [..., E] float32, float16 or bfloat16; lr [E] float32. `architecture` is the oldest compute capability the engine
    must run on. Raises MissingPackageError without TensorRT, UnsupportedError for types and sizes the kernel does not take,
    BuildError for shapes that do not fit each other or a layer that TensorRT refuses.
    """
    plugins = register()
    size = _static(h, -1, "h")
    kernel = HypersphereUpdate(size, float(eps), _dtype(h))
    _check("x", x, h.dtype, tuple(h.shape))
    _check("lr", lr, _tensorrt().float32, (size,))
    call = plugins.hypersphere_update(h, x, lr, size=size, eps=kernel.eps, architecture=architecture)
    return _add(network, call, kernel).get_output(0)


def qk_norm(
    network: Any,
    qk: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    q_scale: Any,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    architecture: int = 80,
) -> tuple[Any, Any]:
    """Add rotary embedding, l2 norm of each head and a scale on q; returns the ITensors q [B, H, S, D] and k [B, K, S, D].

    qk [B, S, (H + K) * D] float32, float16 or bfloat16, q heads first; cos and sin float32 [L, R / 2], the first R channels
    of a head being rotated; positions int32 [B, S]; q_scale float32 [H * D]. Raises as `hypersphere_update` does.
    """
    plugins, trt = register(), _tensorrt()
    rotary = 2 * _static(cos, -1, "cos")
    kernel = QKNorm(heads, kv_heads, head_dim, rotary, _dtype(qk))
    if len(qk.shape) != 3 or _static(qk, -1, "qk") != (heads + kv_heads) * head_dim:
        expected = f"[batch, sequence, {(heads + kv_heads) * head_dim}]"
        raise BuildError("shape of qk of the plugin qk_norm", expected=expected, found=str(tuple(qk.shape)))
    _check("cos", cos, trt.float32, (_static(cos, 0, "cos"), rotary // 2))
    _check("sin", sin, trt.float32, tuple(cos.shape))
    _check("positions", positions, trt.int32, tuple(qk.shape)[:2])
    _check("q_scale", q_scale, trt.float32, (heads * head_dim,))
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "rotary_dim": rotary, "architecture": architecture}
    layer = _add(network, plugins.qk_norm(qk, cos, sin, positions, q_scale, **sizes), kernel)
    return layer.get_output(0), layer.get_output(1)


@lru_cache(maxsize=1)
def register() -> Any:
    """Register both plugins, once a process; returns their namespace. Raises MissingPackageError without TensorRT."""
    _tensorrt()
    import tensorrt.plugin as trtp
    from tensorrt.plugin import AutoTuneCombination, KernelLaunchParams, SymIntExprs
    from tensorrt.plugin import TensorDesc as Desc

    def compiled(
        kernel: Kernel, architecture: int, count: Any, blocks_of: Any, integers: Sequence[Any]
    ) -> tuple[str | bytes, str | bytes, KernelLaunchParams, SymIntExprs]:
        launch = KernelLaunchParams()
        launch.grid_x = trtp.cdiv(blocks_of, kernel.block[1])
        launch.block_x, launch.block_y = kernel.block
        extra = SymIntExprs.from_tuple([trtp.SymInt32(value) for value in (count, *integers)])
        return kernel.name.encode(), compile_ptx(kernel, architecture).encode(), launch, extra

    @trtp.register("ngpt::hypersphere_update")
    def describe_update(h: Desc, x: Desc, lr: Desc, size: int, eps: float, architecture: int) -> Desc:
        return h.like()

    @trtp.autotune("ngpt::hypersphere_update")
    def tune_update(h: Desc, x: Desc, lr: Desc, outputs: tuple[Desc]) -> list[AutoTuneCombination]:
        kind = _KINDS[_dtype(h)]
        return [AutoTuneCombination(f"{kind}, {kind}, FP32, {kind}", "LINEAR")]

    @trtp.aot_impl("ngpt::hypersphere_update")
    def build_update(
        h: Desc, x: Desc, lr: Desc, size: int, eps: float, architecture: int, outputs: tuple[Desc], tactic: int
    ) -> tuple[str | bytes, str | bytes, KernelLaunchParams, SymIntExprs]:
        kernel = HypersphereUpdate(size, eps, _dtype(h))
        rows = h.shape_expr.numel() // size
        return compiled(kernel, architecture, rows, rows, ())

    @trtp.register("ngpt::qk_norm")
    def describe_norm(
        qk: Desc,
        cos: Desc,
        sin: Desc,
        positions: Desc,
        q_scale: Desc,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        architecture: int,
    ) -> tuple[Desc, Desc]:
        batch, sequence = qk.shape_expr[0], qk.shape_expr[1]
        q = trtp.from_shape_expr((batch, heads, sequence, head_dim), qk.dtype)
        k = trtp.from_shape_expr((batch, kv_heads, sequence, head_dim), qk.dtype)
        return q, k

    @trtp.autotune("ngpt::qk_norm")
    def tune_norm(
        qk: Desc, cos: Desc, sin: Desc, positions: Desc, q_scale: Desc, outputs: tuple[Desc, Desc]
    ) -> list[AutoTuneCombination]:
        kind = _KINDS[_dtype(qk)]
        return [AutoTuneCombination(f"{kind}, FP32, FP32, INT32, FP32, {kind}, {kind}", "LINEAR")]

    @trtp.aot_impl("ngpt::qk_norm")
    def build_norm(
        qk: Desc,
        cos: Desc,
        sin: Desc,
        positions: Desc,
        q_scale: Desc,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        architecture: int,
        outputs: tuple[Desc, Desc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, KernelLaunchParams, SymIntExprs]:
        kernel = QKNorm(heads, kv_heads, head_dim, rotary_dim, _dtype(qk))
        sequence = qk.shape_expr[1]
        tokens = qk.shape_expr[0] * sequence
        return compiled(kernel, architecture, tokens, tokens * (heads + kv_heads), (sequence, cos.shape_expr[0]))

    return trtp.op.ngpt


# TensorRT's spelling in a type combination.
_KINDS: dict[str, str] = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


def _tensorrt() -> Any:
    import numpy.typing  # noqa: F401  (tensorrt.plugin looks it up without importing it, which NumPy 1 does not allow)

    try:
        import tensorrt
        import tensorrt.plugin
    except ImportError as error:
        raise missing_package("the plugins need TensorRT 10.14 or later", "tensorrt", found=str(error)) from error
    if not hasattr(tensorrt.plugin, "KernelLaunchParams"):
        raise missing_package("the plugins need TensorRT 10.14 or later", "tensorrt", found=str(tensorrt.__version__))
    return tensorrt


def _dtype(tensor: Any) -> Dtype:
    trt = _tensorrt()
    names: dict[Any, Dtype] = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}
    if tensor.dtype not in names:
        raise UnsupportedError("type of a plugin's input", expected=", ".join(get_args(Dtype)), found=str(tensor.dtype))
    return names[tensor.dtype]


def _static(tensor: Any, axis: int, name: str) -> int:
    shape = tuple(tensor.shape)
    if len(shape) < 2 or shape[axis] < 0:
        raise BuildError(f"shape of {name}, input of a plugin", expected=f"a fixed size of axis {axis}", found=str(shape))
    return int(shape[axis])


def _check(name: str, tensor: Any, dtype: Any, shape: Sequence[int]) -> None:
    found = tuple(tensor.shape)
    # An unknown size (-1) may turn out to be any.
    fits = len(found) == len(shape) and all(a == b or -1 in (a, b) for a, b in zip(found, shape, strict=True))
    if tensor.dtype != dtype or not fits:
        raise BuildError(f"input {name} of a plugin", expected=f"{dtype} {list(shape)}", found=f"{tensor.dtype} {list(found)}")


def _add(network: Any, call: Any, kernel: Kernel) -> Any:
    layer = network.add_plugin(call, aot=True)
    if layer is None:
        raise BuildError(f"TensorRT refused the plugin {kernel.name}", remedy="its logger says why")
    return layer
