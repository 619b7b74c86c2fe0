"""Faults of a graph's file: model.onnx is changed after it was written. Each takes an onnx.ModelProto and changes it in place."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.mutations.weights import LAYER


def zero_point_off(model):
    """Every quantised matrix gets a zero point of one less than the one that its codes were made with."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        attributes = {a.name: a.i for a in node.attribute}
        rows, blocks = attributes["N"], stored[node.input[1]].dims[1]
        if attributes["bits"] == 4:
            packed = np.full((rows, -(-blocks // 2)), 0x77, np.uint8)
        else:
            packed = np.full((rows, blocks), 127, np.uint8)
        name = f"{node.input[1]}.zero"
        model.graph.initializer.append(numpy_helper.from_array(packed.reshape(-1), name))
        del node.input[3:4]
        node.input.insert(3, name)


def block_doubled(model):
    """The scale of one block of one matrix is twice as large."""
    for tensor in model.graph.initializer:
        if tensor.name == f"layers.{LAYER}.mlp.down.scales":
            scales = numpy_helper.to_array(tensor).copy()
            scales[np.abs(scales).argmax()] *= 2
            tensor.CopyFrom(numpy_helper.from_array(scales, tensor.name))
            return
    raise AssertionError("no such matrix")


def mlp_negated(model):
    """A Neg stands behind one layer's MLP."""
    name = f"layers.{LAYER}.mlp.down"
    for place, node in enumerate(model.graph.node):
        if name in node.output:
            node.output[list(node.output).index(name)] = f"{name}.right"
            model.graph.node.insert(place + 1, helper.make_node("Neg", [f"{name}.right"], [name], name=f"{name}/Neg"))
            return
    raise AssertionError("no such product")


def caches_crossed(model):
    """Two layers read each other's past keys."""
    one, two = (f"past_key_values.{layer}.key" for layer in (LAYER, LAYER + 1))
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in (one, two):
                node.input[place] = two if name == one else one


def edit(path, change):
    """Apply one to a file."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
