"""TEST DOUBLE of the two plugin layers in a network of TensorRT-RTX, which takes no plugins.

Each plugin is stood for by ordinary layers of the right shapes and types; `results` maps their names to functions that compute
what the plugin would: the kernel's own source, run by the emulated device. Only the evaluator can compute such a network.
"""

from __future__ import annotations

import numpy as np


class PluginLayers:
    """Has the functions of export.plugins.registration. ``launch(kernel, count, *arguments)`` runs a kernel."""

    def __init__(self, trt, launch, types):
        self.trt, self.launch, self.types = trt, launch, types
        self.results, self.kernels, self.kept = {}, [], []

    def _name(self, layer, compute):
        layer.name = f"plugin.{len(self.results)}"
        self.results[layer.name] = compute
        return layer.get_output(0)

    def hypersphere_update(self, network, h, x, lr, *, eps, architecture):
        from export.plugins.kernels import HypersphereUpdate

        assert h.dtype == x.dtype and tuple(lr.shape) == (h.shape[-1],) and lr.dtype == self.trt.DataType.FLOAT
        kernel = HypersphereUpdate(int(h.shape[-1]), eps, self.types[h.dtype])
        self.kernels.append((kernel, architecture))
        names = [tensor.name for tensor in (h, x, lr)]

        def compute(known):
            a, b, rate = (np.ascontiguousarray(known[name]) for name in names)
            out = np.empty_like(a)
            rows = a.size // a.shape[-1]
            self.launch(kernel, rows, a, b, rate, rows, out)
            return out

        return self._name(network.add_elementwise(h, x, self.trt.ElementWiseOperation.SUM), compute)

    def qk_norm(self, network, qk, cos, sin, positions, q_scale, *, heads, kv_heads, head_dim, architecture):
        from export.plugins.kernels import QKNorm

        assert positions.dtype == self.trt.DataType.INT32 and tuple(q_scale.shape) == (heads * head_dim,)
        kernel = QKNorm(heads, kv_heads, head_dim, 2 * int(cos.shape[1]), self.types[qk.dtype])
        self.kernels.append((kernel, architecture))
        names = [tensor.name for tensor in (qk, cos, sin, positions, q_scale)]

        def compute(known):
            packed, c, s, at, scale = (np.ascontiguousarray(known[name]) for name in names)
            batch, tokens = at.shape
            q, k = (np.empty((batch, n, tokens, head_dim), packed.dtype) for n in (heads, kv_heads))
            self.launch(kernel, batch * tokens, packed, c, s, at, scale, batch * tokens, tokens, len(c), q, k)
            return q, k

        by_head = network.add_shuffle(qk)
        by_head.reshape_dims, by_head.second_transpose = (0, 0, heads + kv_heads, head_dim), (0, 2, 1, 3)
        outputs = []
        for index, chosen in enumerate((range(heads), range(heads, heads + kv_heads))):
            wanted = np.array(chosen, np.int32)
            self.kept.append(wanted)
            constant = network.add_constant(wanted.shape, self.trt.Weights(wanted)).get_output(0)
            layer = network.add_gather(by_head.get_output(0), constant, 1)
            outputs.append(self._name(layer, lambda known, index=index: compute(known)[index]))
        return tuple(outputs)
