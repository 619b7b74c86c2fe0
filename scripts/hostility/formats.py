"""Formats that are not text alone: safetensors, the zip and the pickle of a ckpt.pt, the protobuf of a graph."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import random
import struct
import zipfile
from typing import Any

from scripts.hostility.mutations import NUMBERS, PATHS, spelled, spoil_bytes, spoil_json, value

_NAMES = ("dtype", "shape", "data_offsets", "__metadata__")
_OPCODES = bytes(
    sorted({ord(op) for op in "(.012FIJKLMNPQRSTUVXabcdeghijlopqrstu}]\x80\x81\x82\x85\x86\x87\x88\x89\x8c\x8d\x8e\x93\x94\x95"})
)


def spoil_safetensors(data: bytes, pick: random.Random) -> bytes:
    """Its header's tree, the length of its header, or its bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = pick.randrange(10)
    if kind < 6:
        tree = json.loads(header)
        if pick.random() < 0.5:
            _spoil_entry(tree, pick)
        else:
            header = spoil_json(tree, pick, (*_NAMES, *list(tree)[:3]))
            return struct.pack("<Q", len(header)) + header + rest
        header = spelled(tree, pick if pick.random() < 0.2 else None).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(header)) + header + rest
    if kind == 6:
        said = pick.choice((0, 1, 7, length - 1, length + 1, 1 << 20, (100 << 20) + 1, 1 << 31, 1 << 62, (1 << 64) - 1))
        return struct.pack("<Q", said) + data[8:]
    if kind == 7:
        return data[: pick.randrange(len(data))]
    if kind == 8:
        values = bytearray(rest)
        at = pick.randrange(len(values) - 4) & ~3
        values[at : at + 4] = pick.choice(
            (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0")
        )  # NaN, infinity, largest
        return data[: 8 + length] + bytes(values)
    return spoil_bytes(data, pick)


def _spoil_entry(tree: dict[str, Any], pick: random.Random) -> None:
    """One tensor says something else of itself."""
    entry = tree[pick.choice([name for name in tree if name != "__metadata__"])]
    kind = pick.randrange(6)
    if kind == 0:
        entry["dtype"] = pick.choice(("F64", "I64", "BF16", "F8_E4M3", "F32\0", "BOOL", "f32", "X", "F4"))
    elif kind == 1:
        entry["shape"] = [pick.choice(NUMBERS[:16]) for _ in range(pick.choice((0, 1, 2, 3, 200)))]
    elif kind == 2:
        entry["data_offsets"] = [pick.choice(NUMBERS[:14]) for _ in range(pick.choice((0, 1, 2, 2, 2, 3)))]
    elif kind == 3:
        entry["data_offsets"][pick.randrange(2)] += pick.choice((-4, -1, 1, 4, 1 << 40))
    elif kind == 4:
        entry["shape"] = list(reversed(entry["shape"])) or [1]
    else:
        tree[pick.choice(PATHS)] = dict(entry)


def spoil_archive(data: bytes, pick: random.Random) -> bytes:
    """A ckpt.pt: the pickle in it, its members' names, sizes, order and compression, or the archive's bytes."""
    if pick.random() < 0.25:
        return spoil_bytes(data, pick)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    kind, at = pick.randrange(8), pick.randrange(len(members))
    code = next(number for number, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    if kind < 4:
        members[code] = members[code][0], spoil_pickle(members[code][1], pick)
    elif kind == 4:
        name = pick.choice(PATHS) or "x"
        members[at] = name.replace("\ud800", "?").replace("\0", "?")[:60_000], members[at][1]
    elif kind == 5:
        members[at] = members[at][0], spoil_bytes(members[at][1], pick)
    elif kind == 6:
        members.append(members[at])
    else:
        members.pop(at)
    made = io.BytesIO()
    packed = zipfile.ZIP_DEFLATED if pick.random() < 0.15 else zipfile.ZIP_STORED
    with zipfile.ZipFile(made, "w", packed) as archive, contextlib.suppress(ValueError):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a name that is there twice, which is meant
            for name, content in members:
                archive.writestr(name, content)
            if pick.random() < 0.02:
                archive.writestr("bomb", b"\0" * (64 << 20), zipfile.ZIP_DEFLATED)
    return made.getvalue()


def spoil_pickle(data: bytes, pick: random.Random) -> bytes:
    """Other opcodes, other names to import, other numbers, objects that grow, or a pickle of something else."""
    kind = pick.randrange(9)
    if kind == 0:
        return spoil_bytes(data, pick)
    if kind == 1:
        made = bytearray(data)
        for _ in range(pick.randrange(1, 6)):
            made[pick.randrange(len(made))] = pick.choice(_OPCODES)
        return bytes(made)
    if kind == 2:
        for old, new in ((b"torch", pick.choice((b"posix", b"torcH", b"numpy"))), (b"collections", b"subprocesss")):
            data = data.replace(old, new[: len(old)].ljust(len(old), b"_"), pick.choice((1, -1)))
        return data
    if kind == 3:
        call = pick.choice(
            (b"cposix\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nexec\n", b"csubprocess\nPopen\n", b"ctorch\nload\n")
        )
        return data[:2] + call + b"X\x02\x00\x00\x00id\x85R0" + data[2:]
    if kind == 4:  # each list holds the one before ten times
        return b"\x80\x02]q\x00" + b"".join(b"](h\0" + b"h\0" * 9 + b"eq\0" for _ in range(pick.choice((5, 40, 400)))) + b"."
    if kind == 5:
        return b"\x80\x02" + pick.choice((b"(" * 100_000, b"]" * 100_000, b"N2" * 200_000, b"}" * 50_000 + b"s" * 10)) + b"."
    if kind == 6:
        said = pick.choice((1 << 20, 1 << 31, (1 << 32) - 1))
        return b"\x80\x04" + pick.choice((b"X", b"B", b"j", b"r")) + struct.pack("<I", said) + b"x."
    if kind == 7:
        with contextlib.suppress(Exception):
            return pickle.dumps(value(pick), protocol=2)
    return pickle.dumps(
        {"model": {"a": 1}, "model_args": {"n_layer": pick.choice(NUMBERS), "n_embd": value(pick, 1)}}, protocol=2
    )


def spoil_graph(data: bytes, pick: random.Random) -> bytes:
    """An ONNX graph: nodes, attributes, weights and shapes changed, or its bytes."""
    import onnx

    if pick.random() < 0.35:
        return spoil_bytes(data, pick)
    model = onnx.load_model_from_string(data)
    graph = model.graph
    for _ in range(pick.choice((1, 1, 2, 4))):
        kind = pick.randrange(12)
        node = pick.choice(graph.node)
        if kind == 0:
            node.op_type = pick.choice(("Add", "MatMul", "Loop", "If", "Reshape", "nonsense", "GroupQueryAttention", "Shape", ""))
        elif kind == 1 and node.input:
            node.input[pick.randrange(len(node.input))] = pick.choice(
                (*node.output, *graph.node[0].output, "nothing", "", "logits")
            )
        elif kind == 2 and node.attribute:
            attribute = pick.choice(node.attribute)
            attribute.i, attribute.f = pick.choice((0, -1, 2, 7, 2**31, 2**62)), pick.choice((0.0, float("nan"), 1e38))
        elif kind == 3:
            node.domain = pick.choice(("", "com.microsoft", "ai.onnx.ml", "nobody"))
        elif kind == 4:
            graph.node.remove(node)
        elif kind in (5, 6) and graph.initializer:
            _spoil_weight(pick.choice(graph.initializer), pick)
        elif kind == 7:
            shape = pick.choice((*graph.input, *graph.output)).type.tensor_type.shape
            if shape.dim:
                pick.choice(shape.dim).dim_value = pick.choice((0, -1, 1, 2**31, 2**62))
        elif kind == 8:
            model.opset_import[0].version = pick.choice((0, -1, 1, 7, 99, 2**60))
        elif kind == 9:
            graph.node.append(node)
        elif kind == 10:
            pick.choice((*graph.input, *graph.output)).name = pick.choice(
                ("x", "", "input_ids", "logits", "past_key_values.0.key")
            )
        else:
            model.ir_version = pick.choice((0, -1, 3, 99, 2**60))
    made: bytes = model.SerializeToString()
    return made


def _spoil_weight(weight: Any, pick: random.Random) -> None:
    kind = pick.randrange(5)
    if kind == 0:
        weight.data_type = pick.choice((0, 1, 2, 7, 8, 10, 16, 22, 99))
    elif kind == 1:
        weight.dims[:] = [pick.choice((0, -1, 1, 64, 2**31, 2**62)) for _ in range(pick.choice((0, 1, 2, 9)))]
    elif kind == 2:
        weight.raw_data = spoil_bytes(weight.raw_data, pick)
    elif kind == 3:
        weight.raw_data = b""
        weight.data_location = 1
        for key, said in (
            ("location", pick.choice(("../../../etc/passwd", "/etc/passwd", "model.onnx", "nowhere"))),
            ("offset", "4096"),
        ):
            entry = weight.external_data.add()
            entry.key, entry.value = key, said
    else:
        weight.name = pick.choice(("x", "", "embed.table", "logits"))
