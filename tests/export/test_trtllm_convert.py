"""Checkpoints in TensorRT-LLM's format: what each rank holds, what config.json says, what conversion costs, what it refuses."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.precision import TENSORRT_LLM
from export.trtllm.convert import convert
from export.trtllm.fp8 import cache_scale
from export.trtllm.layout import rank_layout
from export.trtllm.parallel import Parallel
from export.trtllm.rank_file import RankFile
from export.weights import DeployedWeights
from ngpt import NGPTConfig, NGPTForCausalLM
from ngpt.checkpoint import open_checkpoint
from ngpt.checkpoint.safetensors_file import read_header
from ngpt.errors import BuildError, UnsupportedError
from ngpt.weights import Weights
from tests.conftest import GOLDEN
from tests.doubles.tensorrt_llm_double.layers import Mapping


def ranks(folder, out, parallel, precision="fp32"):
    with open_checkpoint(folder) as checkpoint:
        weights = DeployedWeights(Weights(checkpoint))
        convert(weights, out, parallel, TENSORRT_LLM[precision])
        plain = {name: torch.from_numpy(weights.get(name)) for name in weights.names()}
    return [load_file(out / f"rank{rank}.safetensors") for rank in range(parallel.world)], plain


def test_ranks_hold_the_heads_rows_and_columns_that_are_theirs(tmp_path):
    """Case llama3-rope-bias: 4 query heads of 32 channels on 2 key heads, so 4 ranks hold each key head twice."""
    got, plain = ranks(GOLDEN / "llama3-rope-bias", tmp_path, Parallel(tp=4))
    for kind in ("weight", "bias"):
        q, k, v = (plain[f"layers.1.attn.{part}.{kind}"] for part in "qkv")
        for rank, tensors in enumerate(got):
            head, key = slice(32 * rank, 32 * rank + 32), slice(32 * (rank // 2), 32 * (rank // 2) + 32)
            want = torch.cat((q[head], k[key], v[key]))
            assert torch.equal(tensors[f"transformer.layers.1.attention.qkv.{kind}"], want)
    o, down = plain["layers.1.attn.o.weight"], plain["layers.1.mlp.down.weight"]
    assert torch.equal(torch.cat([t["transformer.layers.1.attention.dense.weight"] for t in got], 1), o)
    assert torch.equal(torch.cat([t["transformer.layers.1.mlp.proj.weight"] for t in got], 1), down)
    for kind in ("weight", "bias"):
        up = torch.cat([t[f"transformer.layers.1.mlp.fc.{kind}"] for t in got])
        assert torch.equal(up, plain[f"layers.1.mlp.up.{kind}"])
    assert torch.equal(torch.cat([t["transformer.layers.1.attention.q_scale"] for t in got]), plain["layers.1.attn.q_scale"])
    for tensors in got:  # whole on every rank: RowLinear adds the bias after its all-reduce
        for name, canonical in (("attention.dense.bias", "attn.o.bias"), ("mlp.lr", "mlp.lr"), ("attention.lr", "attn.lr")):
            assert torch.equal(tensors[f"transformer.layers.1.{name}"], plain[f"layers.1.{canonical}"])


def test_vocabularies_that_do_not_divide_end_in_zero_rows(tmp_path):
    config = NGPTConfig(vocab_size=251, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=16)  # fmt: skip
    NGPTForCausalLM(config).save_pretrained(tmp_path / "checkpoint")
    got, plain = ranks(tmp_path / "checkpoint", tmp_path, Parallel(tp=2))
    for name, canonical in (("transformer.vocab_embedding.weight", "embed"), ("lm_head.weight", "head.weight")):
        table = torch.cat([tensors[name] for tensors in got])
        assert table.shape == (252, 64) and torch.equal(table[:251], plain[canonical]) and not table[251].any()


def test_stages_hold_their_layers_and_ends(tmp_path):
    got, plain = ranks(GOLDEN / "gqa", tmp_path, Parallel(tp=2, pp=2))
    assert ["transformer.vocab_embedding.weight" in t for t in got] == [True, True, False, False]
    assert ["lm_head.weight" in t for t in got] == [False, False, True, True]
    lr = "transformer.layers.{}.mlp.lr"
    for rank, layers in enumerate(([0, 1], [0, 1], [2], [2])):
        for local, layer in enumerate(layers):
            assert torch.equal(got[rank][lr.format(local)], plain[f"layers.{layer}.mlp.lr"])
        assert lr.format(len(layers)) not in got[rank]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4", "fp8"])
def test_the_files_are_well_formed_and_typed(precision, tmp_path):
    got, plain = ranks(GOLDEN / "gqa", tmp_path, Parallel(tp=2), precision)
    infos = read_header(tmp_path / "rank1.safetensors")  # strict: tiling, sizes, duplicates
    config = json.loads((tmp_path / "config.json").read_text())
    stored = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[config["dtype"]]
    assert infos.keys() == got[1].keys()
    for name, tensor in got[1].items():
        if name.endswith(("lr", "q_scale", "scaling_factor")):
            assert tensor.dtype == torch.float32
        elif precision == "fp8" and name.startswith("transformer.layers") and name.endswith("weight"):
            assert tensor.dtype == torch.float8_e4m3fn
        else:
            assert tensor.dtype == stored
    algorithm = {"int8": "W8A16", "int4": "W4A16", "fp8": "FP8"}.get(precision)
    assert config["quantization"]["quant_algo"] == algorithm
    assert config["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    assert config["position_embedding_type"] == "learned_absolute" and config["rotary_embedding_dim"] == 0
    if precision == "fp8":
        scales = [t["transformer.layers.0.attention.qkv.weights_scaling_factor"] for t in got]
        wide = got[1]["transformer.layers.0.attention.qkv.weight"].float() * scales[1]
        assert torch.equal(*scales)
        q = plain["layers.0.attn.q.weight"][32:]
        assert float((wide[:32] - q).abs().max()) <= float(q.abs().max()) * 2**-4


def test_an_fp8_cache_adds_one_scale_a_layer_the_same_on_every_rank(tmp_path):
    """Case llama3-rope-bias, whose values' bounds exceed 1; stage 0 of two holds layers 0 and 1."""
    (tmp_path / "auto").mkdir()
    with open_checkpoint(GOLDEN / "llama3-rope-bias") as checkpoint:
        weights = DeployedWeights(Weights(checkpoint))
        convert(weights, tmp_path, Parallel(2, 2), TENSORRT_LLM["bf16"].with_cache("float8_e4m3"))
        convert(weights, tmp_path / "auto", Parallel(2, 2), TENSORRT_LLM["bf16"])
        scales = [cache_scale(weights, layer) for layer in range(3)]
    assert json.loads((tmp_path / "config.json").read_text())["quantization"] == {
        "quant_algo": None,
        "kv_cache_quant_algo": "FP8",
    }
    name = "transformer.layers.{}.attention.kv_cache_scaling_factor"
    assert len(set(scales)) == 3
    for rank, layers in enumerate(([0, 1], [0, 1], [2], [2])):
        got, plain = (load_file(folder / f"rank{rank}.safetensors") for folder in (tmp_path, tmp_path / "auto"))
        for local, layer in enumerate(layers):
            assert torch.equal(got.pop(name.format(local)), torch.tensor([scales[layer]]))
        assert got.keys() == plain.keys() and all(torch.equal(got[key], plain[key]) for key in got)


def test_conversion_holds_one_tensor_at_a_time(tmp_path):
    config = NGPTConfig(vocab_size=512, hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=64, dtype=torch.float16)  # fmt: skip
    NGPTForCausalLM(config).half().save_pretrained(tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        weights = DeployedWeights(Weights(checkpoint), arithmetic="float16")
        sizes = [4 * int(np.prod(weights.shape(name))) for name in weights.names()]
        for precision in ("bf16", "fp8"):
            out = tmp_path / precision
            out.mkdir()
            tracemalloc.start()
            convert(weights, out, Parallel(tp=2), TENSORRT_LLM[precision])
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 * max(sizes) < sum(sizes) / 10, (precision, peak, max(sizes), sum(sizes))


@pytest.mark.parametrize("pp", range(1, 8))
@pytest.mark.parametrize("count", [7, 8, 32])
def test_stages_are_those_of_tensorrt_llms_mapping(count, pp):
    for stage in range(pp):
        assert list(Parallel(pp=pp).layers(stage, count)) == Mapping(pp, stage, 1, pp).pp_layers(count)


@pytest.mark.parametrize(
    ("parallel", "named"),
    [({"tp": 3}, "num_attention_heads"), ({"pp": 4}, "num_hidden_layers"), ({"tp": 0}, "--tp"), ({"pp": 0}, "--pp")],
)
def test_sizes_that_cannot_be_divided_are_named(parallel, named, tmp_path):
    with pytest.raises(UnsupportedError, match=named):
        ranks(GOLDEN / "gqa", tmp_path, Parallel(**parallel))
    assert not list(tmp_path.iterdir())


def test_a_file_takes_only_what_was_announced(tmp_path):
    with RankFile(tmp_path / "rank0.safetensors", {"a": (torch.float16, (4, 2))}) as file:
        file.write("a", 1, torch.ones(2, 2, dtype=torch.float16))
        for at, rows in ((0, torch.ones(2, 2)), (3, torch.ones(2, 2).half()), (0, torch.ones(2, 3).half())):
            with pytest.raises(BuildError, match="part of a"):
                file.write("a", at, rows)
    assert load_file(tmp_path / "rank0.safetensors")["a"].tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]


def test_values_beyond_float16_are_named(tmp_path):
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        weights = DeployedWeights(Weights(checkpoint), replace=lambda name, m: m * 1e6 if "2.mlp.down" in name else m)
        with pytest.raises(UnsupportedError, match="layers.2.mlp.down.weight in float16"):
            convert(weights, tmp_path, Parallel(), TENSORRT_LLM["fp16"])


def test_a_layout_covers_every_row_but_the_vocabularys_padding():
    with open_checkpoint(GOLDEN / "llama3-rope-bias") as checkpoint:
        weights = DeployedWeights(Weights(checkpoint))
        for rank in range(4):
            for name, entry in rank_layout(weights, Parallel(4), rank).items():
                rows = [r for p in entry.parts for r in range(p.at, p.at + len(p.rows or range(entry.shape[0])))]
                assert sorted(rows) == list(range(entry.shape[0])), name
