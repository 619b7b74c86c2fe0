"""Memory arithmetic, and which target a card gets."""

import dataclasses

import pytest

from engines.device import Device, parse, place, target_for
from engines.sizing import cache_bytes_per_token, check_fits, footprint, weight_bytes
from engines.target import load_target, target_names, with_kv_cache
from ngpt.errors import TargetError
from ngpt.spec import NGPTSpec

SPEC_8B = NGPTSpec.from_config({"model_type": "ngpt"})  # an empty config means the 8B model


def test_the_8b_model_is_as_large_as_its_tensors():
    layer = 4096 * 128 * (32 + 8 + 8 + 32) + 2 * 4096 * 21504
    assert weight_bytes(SPEC_8B, "bf16") == 2 * (32 * layer + 2 * 131072 * 4096) == 16_106_127_360
    assert cache_bytes_per_token(SPEC_8B, "fp16") == 131_072
    assert weight_bytes(SPEC_8B, "int4") < weight_bytes(SPEC_8B, "int8") < weight_bytes(SPEC_8B, "fp16")


def test_an_fp8_cache_takes_a_byte_an_element():
    assert cache_bytes_per_token(SPEC_8B, "bf16", kv_cache="fp8") == 65_536
    target = load_target("h100-trtllm")
    plain, narrow = footprint(SPEC_8B, target), footprint(SPEC_8B, with_kv_cache(target, "fp8"))
    assert plain.cache_row == 2 * narrow.cache_row and plain.weights == narrow.weights
    assert abs(narrow.rows - 2 * plain.rows) <= 1


def test_a_card_that_cannot_hold_the_model_is_refused_with_the_arithmetic():
    wide = dataclasses.replace(SPEC_8B, num_layers=64)
    with pytest.raises(TargetError, match=r"rtx-4090: expected at most 24.00 GB, found 30.06 GB weights \+ 2.15 GB cache.*int4"):
        check_fits(wide, load_target("rtx-4090"))
    assert check_fits(wide, load_target("rtx-4090", "int4")).rows >= 1


@pytest.mark.parametrize("name", [n for n in target_names() if load_target(n).gpu is not None])
def test_the_8b_model_fits_every_card_in_some_precision_and_the_sum_adds_up(name):
    target = load_target(name)
    found = [footprint(SPEC_8B, load_target(name, p)) for p in target.precisions]
    assert max(f.rows for f in found) >= 1
    for f in found:
        taken = f.weights + f.activations + f.rows * f.cache_row
        assert taken <= f.memory < taken + f.cache_row + (2 << 30)


@pytest.mark.parametrize(
    "line, want",
    [
        ("NVIDIA GeForce RTX 5090, 12.0, 32607", Device("NVIDIA GeForce RTX 5090", "12.0", 32607 << 20)),
        ("NVIDIA GB10, 12.1, [N/A]\n", Device("NVIDIA GB10", "12.1", 0)),
        ("No devices were found", None),
        ("", None),
    ],
)
def test_nvidia_smis_answer_is_read(line, want):
    assert parse(line) == want


@pytest.mark.parametrize(
    "card, capability, target",
    [
        ("NVIDIA GeForce RTX 5090", "12.0", "rtx-5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "12.0", "rtx-pro-6000"),
        ("NVIDIA L40S", "8.9", "l40s"),
        ("NVIDIA L4", "8.9", "l4"),
        ("NVIDIA H200", "9.0", "h200"),
        ("NVIDIA H100 80GB HBM3", "9.0", "h100"),
        ("NVIDIA A100-SXM4-80GB", "8.0", "a100"),
        ("NVIDIA GB10", "12.1", "dgx-spark"),
        ("NVIDIA GeForce RTX 5070 Ti", "12.0", "rtx-5090"),  # no target of its own: the smallest of its kind
    ],
)
def test_auto_picks_the_cards_own_target(card, capability, target):
    assert target_for(Device(card, capability, 0)).name == target


def test_a_card_without_a_target_is_told_which_there_are():
    with pytest.raises(TargetError, match=r"7\.0.*h100 \(9\.0\)"):
        target_for(Device("Tesla V100", "7.0", 0))


def test_a_named_card_is_as_large_as_its_target_says():
    assert place("rtx-4090") == Device("rtx-4090", "8.9", 24_000_000_000)
    assert place("8.6") == Device("compute capability 8.6", "8.6", 0)  # whose memory nobody knows
