"""What the reference's margins say about flipped labels: Bayes' rule, recovery, silence where nothing is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from app.method.reference_flips import LARGEST_RATE, SMALLEST_RATE, ReferenceFlips, fitted, label_weights


def margins_of(rate: float, slope: float, count: int = 20_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Margins of pairs as the model supposes them, and which of them are flipped."""
    random = torch.Generator().manual_seed(seed)
    size = torch.randn(count, generator=random, dtype=torch.float64).abs()
    agrees = torch.rand(count, generator=random) < torch.sigmoid(slope * size)
    flipped = torch.rand(count, generator=random) < rate
    return torch.where(agrees ^ flipped, size, -size), flipped


def fit(margins: Tensor, rounds: int = 2000) -> ReferenceFlips:
    found = fitted(margins, None, rounds)
    assert found is not None
    return found


@pytest.mark.parametrize("margin", [-2.0, -0.1, 0.0, 0.7, 3.0])
def test_bayes_rule_written_out(margin: float) -> None:
    rate, slope = 0.2, 1.7
    agrees = 1 / (1 + math.exp(-slope * margin))
    flipped, right = rate * (1 - agrees), (1 - rate) * agrees
    found = ReferenceFlips(rate, slope).probability(torch.tensor([margin], dtype=torch.float64))
    assert float(found) == pytest.approx(flipped / (flipped + right), rel=1e-9)


@pytest.mark.parametrize(("rate", "slope"), [(0.1, 3.0), (0.15, 5.0), (0.3, 5.0), (0.3, 20.0)])
def test_share_and_slope_are_recovered_from_the_margins_alone(rate: float, slope: float) -> None:
    margins, flipped = margins_of(rate, slope)
    found = fit(margins)
    assert found.rate == pytest.approx(rate, abs=0.03)
    assert found.slope == pytest.approx(slope, rel=0.25)
    probability = found.probability(margins)
    for low in (0.0, 0.25, 0.5, 0.75):  # calibrated
        inside = (probability >= low) & (probability < low + 0.25)
        if int(inside.sum()) > 500:
            share = float(flipped[inside].double().mean())
            assert share == pytest.approx(float(probability[inside].mean()), abs=0.05)


def test_without_flips_hardly_any_weight_is_lost() -> None:
    margins, _ = margins_of(0.0, 5.0)
    found = fit(margins)
    assert found.rate < 0.01
    assert float((found.probability(margins) > 0.25).double().mean()) < 0.01


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_a_reference_that_knows_nothing_changes_nothing(rate: float) -> None:
    for seed in range(5):
        margins, _ = margins_of(rate, 0.0, 1024, seed)
        weights = label_weights(fit(margins, 200).probability(margins), torch.ones(1024, dtype=torch.bool))
        assert float(weights.std()) < 0.3


def test_it_goes_on_from_where_it_was() -> None:
    margins, _ = margins_of(0.2, 4.0)
    at_once, step_by_step = fit(margins, 300), None
    for _ in range(30):
        step_by_step = fitted(margins, step_by_step, 10)
    assert step_by_step is not None
    assert step_by_step.rate == pytest.approx(at_once.rate, rel=1e-9)
    assert step_by_step.slope == pytest.approx(at_once.slope, rel=1e-9)


def test_margins_of_zero_say_nothing() -> None:
    before = ReferenceFlips(0.2, 3.0)
    for silent in (torch.zeros(5), torch.zeros(0), torch.full((3,), 1e-12)):
        assert fitted(silent, None) is None
        assert fitted(silent, before) == before


@given(
    margins=st.lists(st.floats(-1e3, 1e3, width=16), min_size=1, max_size=40).filter(
        lambda column: max(map(abs, column)) > 0.01
    ),
    unit=st.sampled_from([2.0**-9, 2.0**-3, 2.0**10]),
)
def test_estimates_stay_in_bounds_and_know_no_unit(margins: list[float], unit: float) -> None:
    column = torch.tensor(margins, dtype=torch.float64)
    found, scaled = fit(column, 20), fit(unit * column, 20)
    assert SMALLEST_RATE <= found.rate <= LARGEST_RATE
    assert 0.0 <= found.slope < math.inf
    assert scaled.rate == pytest.approx(found.rate, rel=1e-6)
    assert scaled.slope * unit == pytest.approx(found.slope, rel=1e-6, abs=1e-12)


def test_a_pair_without_a_margin_has_no_probability() -> None:
    found = ReferenceFlips(0.2, 1.0).probability(torch.tensor([math.nan, 0.0]))
    assert found.isnan().tolist() == [True, False]


def test_weights_are_means_over_the_kept_pairs() -> None:
    probability = torch.tensor([0.0, 0.25, 0.5, 0.9, math.nan], dtype=torch.float64)
    kept = torch.tensor([True, True, True, False, False])
    assert label_weights(probability, kept).tolist() == pytest.approx([2.0, 1.0, 0.0, 0.0, 0.0])
    assert label_weights(torch.full((3,), 0.5), torch.ones(3, dtype=torch.bool)).tolist() == [1.0] * 3
    assert label_weights(torch.zeros(2), torch.zeros(2, dtype=torch.bool)).tolist() == [1.0, 1.0]
