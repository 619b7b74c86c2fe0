"""The TensorRT network with this project's fused kernels where they apply; elsewhere the native layers it inherits.

Contract-tested: the kernels run in emulation on the CPU, their registration under TensorRT's own Python code; not executed on
TensorRT, whose library cannot be installed from PyPI. TensorRT-RTX takes no plugins.
"""

from __future__ import annotations

from typing import Any

from export.lowerings.tensorrt.library import Tensor
from export.lowerings.tensorrt.native import TensorRT
from export.plugins import registration
from export.plugins.kernels import HypersphereUpdate, QKNorm
from export.weights import rope_tables
from ngpt.errors import UnsupportedError


class TensorRTPlugins(TensorRT):
    """Overrides the two coarse operations that the kernels are."""

    def queries_keys_values(self, name: str, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        if spec.position != "rope" or not _takes(
            QKNorm, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.rotary_dim, "float32"
        ):
            return super().queries_keys_values(name, h)
        heads, keys, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        packed = self.matmul(f"{name}.qk", h, [f"{name}.q", f"{name}.k"])
        values = self.split_heads(f"{name}.v_heads", self.linear(f"{name}.v", h), keys)
        cos, sin = (self.constant(f"rope.{n}", t) for n, t in zip(("cos", "sin"), rope_tables(spec), strict=True))
        scale = self.constant(f"{name}.q_scale.flat", self.weights.get(f"{name}.q_scale"))
        q, k = registration.qk_norm(
            self.network,
            packed,
            cos,
            sin,
            self.position_ids,
            scale,
            heads=heads,
            kv_heads=keys,
            head_dim=size,
            architecture=self.architecture,
        )
        return self.named(f"{name}.q_scaled", q), self.named(f"{name}.k_norm", k), values

    def hypersphere_update(self, name: str, h: Tensor, x: Tensor, rate: str, eps: float) -> Tensor:
        if not _takes(HypersphereUpdate, self.spec.hidden_size, eps, "float32"):
            return super().hypersphere_update(name, h, x, rate, eps)
        rates = self.constant(f"{rate}.flat", self.weights.get(rate))
        h, x = self.narrow(f"{name}.h", h), self.narrow(f"{name}.x", x)
        out = registration.hypersphere_update(self.network, h, x, rates, eps=eps, architecture=self.architecture)
        return self.named(name, out)


def _takes(kernel: type[HypersphereUpdate] | type[QKNorm], *sizes: Any) -> bool:
    """Whether the kernel exists for these sizes."""
    try:
        kernel(*sizes)
    except UnsupportedError:
        return False
    return True
