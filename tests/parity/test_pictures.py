"""The report's pictures: of the weights, of curves, of what was decided."""

import dataclasses
import math

import numpy as np
import pytest

from engines.parity.invariants import invariants_of
from engines.parity.pictures import strip
from engines.parity.steps import STEPS
from engines.parity.svg import MOST_POINTS, Chart, Line, Row, Strip, Whiskers
from export.taps import LAYER_TAPS
from ngpt.checkpoint import open_checkpoint
from ngpt.weights import Weights
from tests.conftest import GOLDEN
from tests.parity.test_report import made

# Weights


@pytest.mark.parametrize("name", ["gqa", "dead-mlp", "research-checkpoint"])
def test_the_weights_pictures_show_what_is_in_the_checkpoint(name):
    with open_checkpoint(GOLDEN / name) as checkpoint:
        found = {item.name: item for item in invariants_of(checkpoint)}
        weights, spec = Weights(checkpoint), checkpoint.spec
        layers = list(range(spec.num_layers))
        assert {
            "attn.q",
            "attn.o",
            "mlp.down",
            "sqk",
            "suv",
            "sz",
            "attention alpha",
            "MLP alpha",
            "embed_tokens",
            "lm_head",
        } <= set(found)
        for part in ("attention alpha", "MLP alpha"):
            item = found[part]
            rates = [weights.get(f"layers.{layer}.{'attn' if part.startswith('a') else 'mlp'}.lr") for layer in layers]
            assert item.layers == layers and item.kind == "scale"
            np.testing.assert_allclose(np.maximum(np.abs(item.low), np.abs(item.high)), [rate.max() for rate in rates], rtol=1e-6)
        sqk = [np.sqrt(weights.get(f"layers.{layer}.attn.q_scale").max()) for layer in layers]
        np.testing.assert_allclose(np.maximum(np.abs(found["sqk"].low), np.abs(found["sqk"].high)), sqk, rtol=1e-6)
        assert (found["attn.o"].kind, found["attn.q"].kind) == ("norm of columns", "norm of rows")
        down = checkpoint.get("model.layers.1.mlp.down_proj.weight").double().norm(dim=0).numpy()
        assert found["mlp.down"].high[1] == pytest.approx(down.max(), rel=1e-6)
        assert found["mlp.down"].zeros[1] == (down == 0).sum()
        assert found["sz"].layers == [] and len(found["sz"].mean) == 1


def test_each_scale_is_shown_as_the_network_uses_it():
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        before = {item.name: item.mean[0] for item in invariants_of(checkpoint) if item.kind == "scale"}
        fields = ("sqk_scale", "attn_alpha_scale", "suv_scale", "mlp_alpha_scale", "sz_scale")
        factors = {name: 2.0 + place for place, name in enumerate(fields)}
        checkpoint.spec = dataclasses.replace(
            checkpoint.spec, **{name: getattr(checkpoint.spec, name) * factors[name] for name in fields}
        )
        after = {item.name: item.mean[0] for item in invariants_of(checkpoint) if item.kind == "scale"}
    names = ("sqk", "attention alpha", "suv", "MLP alpha", "sz")
    assert {name: round(after[name] / before[name], 6) for name in names} == dict(zip(names, factors.values(), strict=True))


def test_blocks_of_a_matrix_give_the_norms_of_the_whole(monkeypatch):
    with open_checkpoint(GOLDEN / "gqa") as checkpoint:
        whole = invariants_of(checkpoint)
        monkeypatch.setattr("engines.parity.invariants._BLOCK", 1000)
        for a, b in zip(whole, invariants_of(checkpoint), strict=True):
            np.testing.assert_allclose([a.low, a.mean, a.high], [b.low, b.mean, b.high], rtol=1e-6)


# Pictures


def test_a_chart_survives_empty_zero_and_nan_values():
    for values in ([], [0.0, 0.0], [math.nan, 1e-7, math.inf], [1e-300, 1.0], [5e-324]):
        chart = Chart("title", "about", lines=[Line("engine", values, "engine")])
        numbers = [at for at, _ in [*chart.powers(), *chart.steps()]] + [
            x for run in chart.runs(chart.lines[0]) for pair in run for x in pair
        ]
        assert np.isfinite(numbers).all() and len(list(chart.powers())) >= 2
        assert sum(map(len, chart.runs(chart.lines[0]))) == sum(math.isfinite(value) for value in values)
        assert all(chart.top <= y <= chart.bottom for run in chart.runs(chart.lines[0]) for _, y in run)


def test_a_peak_of_a_long_line_is_not_thinned_away():
    values = [1e-6] * 5000
    values[3333] = 1.0
    chart = Chart("title", "about", lines=[Line("engine", values, "engine"), Line("noise", values, "noise")])
    for line in chart.lines:
        points = [point for run in chart.runs(line) for point in run]
        assert len(points) <= MOST_POINTS and min(points, key=lambda point: point[1]) == (chart.x(3333), chart.y(1.0))


def test_the_strip_tells_what_could_be_decided_from_what_could_not():
    report = made(length=8, sequences=1)  # margins 0 1 2 3 0 1 2 3, decidable above 1.5; another choice at 3 and 5
    picture = strip(report)
    assert picture.rows[0].cells == "??=x?~=="
    assert "4 are decidable: at 3 the choice is the same, at 1 it is wrong" in picture.about


def test_a_strip_has_every_position_once():
    strip = Strip("title", "about", rows=[Row("a", "==?~x=", 2), Row("b", "=", 1)])
    runs = list(strip.runs(strip.rows[0]))
    assert [letter for *_, letter in runs] == ["=", "?", "~", "x", "="]
    assert runs[0][0] == strip.left and runs[-1][0] + runs[-1][1] == pytest.approx(strip.right)


@pytest.mark.parametrize("ends", [(0.2, 0.9), (-3.0, 5.0), (1.0, 1.0), (0.0, 0.0), (0.98, 1.02), (math.nan, math.inf)])
def test_whiskers_lie_inside_their_frame(ends):
    low, high = ends
    picture = Whiskers("title", "about", low=[low], mean=[(low + high) / 2], high=[high])
    (bar,) = picture.bars()
    assert np.isfinite(bar).all() and all(picture.top <= y <= picture.bottom for y in bar[1:])
    assert 2 <= len(list(picture.powers())) <= 12


def test_every_sub_step_is_explained():
    assert set(STEPS) == {"embed", *LAYER_TAPS}
