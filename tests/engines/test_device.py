"""Which target a card gets: what the driver says, and what targets' files say."""

import shutil

import pytest

import engines.target
from engines.device import Device, parse, place, target_for
from engines.target import FOLDER, load_target
from ngpt.errors import TargetError


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


def test_a_copied_card_is_never_taken_by_itself(tmp_path, monkeypatch):
    """A copy, smaller and with a name that would win, changes nothing for its siblings; one that keeps the card's name is refused."""
    folder = tmp_path / "targets"
    shutil.copytree(FOLDER, folder)
    monkeypatch.setattr(engines.target, "FOLDER", folder)
    text = (folder / "l40s.toml").read_text().replace("memory_gb = 48", "memory_gb = 1")
    named = text.replace('cards = ["L40S"]\n', "")
    assert named != text and "memory_gb = 1\n" in named
    (folder / "nvidia-l40s.toml").write_text(named)
    assert target_for(Device("NVIDIA L40S", "8.9", 0)).name == "l40s"
    assert target_for(Device("NVIDIA RTX 2000 Ada", "8.9", 0)).name != "nvidia-l40s"
    assert load_target("nvidia-l40s").gpu.memory_gb == 1  # by name it is there
    (folder / "nvidia-l40s.toml").write_text(text)
    with pytest.raises(TargetError, match="two targets name the card NVIDIA L40S.*l40s, nvidia-l40s"):
        target_for(Device("NVIDIA L40S", "8.9", 0))
