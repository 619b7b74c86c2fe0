"""`ngpt-deploy plan`: the arithmetic of a load on one GPU or several, its refusals, and the tables of the guide."""

import dataclasses
import json

import pytest

from engines.capacity import capacity, degrees, plan_capacity, read_spec
from engines.memory import RESERVE, weight_bytes
from engines.target import load_target
from export.precision import TENSORRT
from export.trtllm.parallel import Parallel
from ngpt.errors import ConfigError, TargetError, UnsupportedError
from ngpt.spec import NGPTSpec
from scripts.cli import main
from scripts.generated import END
from scripts.sizing_tables import BEGIN, DOCUMENT, LARGE, tables
from tests.conftest import GOLDEN

SPEC_8B = read_spec(None)
H100 = load_target("h100")


def test_the_8b_model_on_one_h100_by_hand():
    found = plan_capacity(SPEC_8B, H100, 16, 8192)
    projections = 2 * 32 * (4096 * 128 * 80 + 2 * 4096 * 21504)
    table = 2 * 131072 * 4096
    cache = 2 * 32 * 8 * 128 * 2 * 8192 * 16
    vectors = 4 * 32 * (4096 + 2 * 4096)
    assert (found.ranks, found.memory.weights, found.cache) == (1, projections + 2 * table + vectors, cache)
    assert found.step == projections + table + vectors + cache
    assert found.rate == pytest.approx(3350e9 / found.step)
    assert found.free == 80_000_000_000 - RESERVE - found.memory.weights - found.memory.activations - cache


def test_an_fp8_cache_is_half_as_large(capsys):
    plain = plan_capacity(SPEC_8B, load_target("h100-trtllm"), 16, 8192)
    assert main(["plan", "--target", "h100-trtllm", "--kv-cache", "fp8", "--concurrency", "16", "--json"]) == 0
    narrow = json.loads(capsys.readouterr().out)
    assert 2 * narrow["cache"] == plain.cache and narrow["weights"] == plain.memory.weights


@pytest.mark.parametrize("precision", H100.precisions)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_together_hold_the_model_once(precision, ranks):
    """Up to the number of key-value heads nothing is repeated."""
    vectors = 4 * 32 * 2 * 4096  # the learning rates, which every rank has whole
    found = weight_bytes(SPEC_8B, TENSORRT[precision], Parallel(ranks)) - vectors
    scales = (
        2 * 32 * 2 * 4096 * (TENSORRT[precision].projections.block == 0)
    )  # one for each row of o and down, whose columns are split
    assert ranks * (found - scales) == weight_bytes(SPEC_8B, TENSORRT[precision]) - vectors - scales


def test_beyond_the_key_value_heads_each_gpu_keeps_one():
    eight, sixteen = (capacity(SPEC_8B, H100, 1, 8192, Parallel(ranks)).memory for ranks in (8, 16))
    assert eight.cache_token == sixteen.cache_token
    assert eight.weights / 2 < sixteen.weights < eight.weights
    assert degrees(SPEC_8B) == [1, 2, 4, 8, 16, 32]
    assert 3 not in degrees(dataclasses.replace(SPEC_8B, num_heads=24, intermediate_size=24 * 900, num_kv_heads=8))


def test_the_smallest_degree_that_fits_is_found_and_one_less_is_refused_with_the_sum():
    large = NGPTSpec.from_config(LARGE)
    found = plan_capacity(large, H100, 16, 8192)
    below = capacity(large, H100, 16, 8192, Parallel(found.ranks // 2))
    assert found.free >= 0 > below.free
    with pytest.raises(
        TargetError, match=rf"does not fit {below.ranks} x h100.*GB weights \+ .*use --tp {found.ranks}"
    ) as refused:
        plan_capacity(large, H100, 16, 8192, below.ranks)
    assert f"{(below.memory.card - below.free) / 1e9:.2f} GB" in str(refused.value)


def test_more_sequences_than_are_said_to_fit_do_not():
    found = plan_capacity(SPEC_8B, H100, 1, 8192)
    # Activations grow with the batch only where logits are their widest moment; here they do not.
    assert plan_capacity(SPEC_8B, H100, found.most_sequences, 8192, 1).free >= 0
    with pytest.raises(TargetError, match="does not fit 1 x h100"):
        plan_capacity(SPEC_8B, H100, found.most_sequences + 1, 8192, 1)


def test_what_cannot_be_planned_is_refused_by_name(tmp_path):
    with pytest.raises(TargetError, match="cpu-int8 has no GPU.*h100"):
        plan_capacity(SPEC_8B, load_target("cpu-int8"), 1, 10)
    with pytest.raises(TargetError, match="at most 8192 tokens, found 9000"):
        plan_capacity(SPEC_8B, H100, 1, 9000)
    with pytest.raises(UnsupportedError, match="num_attention_heads and parallelism: expected a multiple of --tp 3"):
        plan_capacity(SPEC_8B, H100, 1, 10, 3)
    with pytest.raises(TargetError, match="fit 32 x l4 .*lower --concurrency"):
        plan_capacity(SPEC_8B, load_target("l4"), 100_000, 8192)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="config.json"):
        read_spec(tmp_path / "config.json")


def test_the_command_prints_a_table_and_json(capsys):
    assert main(["plan", "--target", "l4", "--precision", "int8", "--concurrency", "4", "--context", "2048"]) == 0
    out = capsys.readouterr().out
    assert "l4, int8, tensor parallel over 1 GPU\n" in out and "at most" in out and "not measured" in out
    for checkpoint in (GOLDEN / "gqa", GOLDEN / "gqa" / "config.json"):
        assert main(["plan", "--checkpoint", str(checkpoint), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["ranks"] == 1 and found["memory"] - found["reserve"] - found["weights"] > found["cache"] > 0
        assert found["tokens_per_s_at_most"] == found["tokens_per_s_per_sequence_at_most"]
    assert main(["plan", "--concurrency", "1000000"]) == 2
    assert "GB cache (1000000 x 8192 tokens" in capsys.readouterr().err


def test_the_guides_tables_are_what_the_arithmetic_gives():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == tables(), "run: python scripts/sizing_tables.py --write"


def test_a_plan_for_several_gpus_says_what_it_takes_where_the_runtime_uses_one():
    large = NGPTSpec.from_config(LARGE)
    several = plan_capacity(large, H100, 16, 8192)
    assert several.ranks > 1 and "an engine of tensorrt uses one GPU: build for a TensorRT-LLM target" in several.table()
    assert "uses one GPU" not in plan_capacity(large, load_target("h100-trtllm"), 16, 8192).table()
    assert "uses one GPU" not in plan_capacity(SPEC_8B, H100, 1, 8192).table()


def test_stages_of_a_pipeline_hold_their_layers_and_work_one_after_another(capsys):
    assert main(["plan", "--target", "h100-trtllm", "--tp", "2", "--pp", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    single = plan_capacity(SPEC_8B, load_target("h100-trtllm"), 1, 8192, 2)
    assert (found["tp"], found["pp"], found["ranks"]) == (2, 2, 4)
    assert 0.45 < found["weights"] / single.memory.weights < 0.55 and found["cache_token"] * 2 == single.memory.cache_token
    assert found["tokens_per_s_per_sequence_at_most"] == pytest.approx(single.rate, rel=0.1)  # each step goes through both
    assert main(["plan", "--target", "h100-trtllm", "--tp", "2", "--pp", "2"]) == 0
    assert "tensor parallel over 2 GPUs, 2 stages" in capsys.readouterr().out
