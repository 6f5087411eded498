"""The probability that a label is flipped: Bayes' rule written out, simulation, and the limits it must keep."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.method.flips import SMALLEST_SPREAD, flip_probability, flip_weights
from app.method.moments import Moments


def normal(x: float, mean: float, variance: float) -> float:
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3])
@pytest.mark.parametrize(("mean", "variance"), [(0.2, 1.0), (1.0, 1.0), (1.0, 4.0), (2.0, 3.0)])
def test_bayes_rule_written_out(mean: float, variance: float, rate: float) -> None:
    """The moments of the mixture go in; what comes out is the posterior of its components."""
    first = (1 - 2 * rate) * mean
    moments = Moments(first, math.sqrt(variance + mean**2 - first**2))
    gaps = torch.linspace(-4, 4, 17, dtype=torch.float64)
    found = flip_probability(gaps, moments, rate)
    for gap, probability in zip(gaps.tolist(), found.tolist(), strict=True):
        flipped, right = rate * normal(gap, -mean, variance), (1 - rate) * normal(gap, mean, variance)
        assert probability == pytest.approx(flipped / (flipped + right), rel=1e-9)


def test_it_is_calibrated_on_the_mixture_it_assumes() -> None:
    random = torch.Generator().manual_seed(0)
    flipped = torch.rand(200_000, generator=random) < 0.15
    gaps = (1.0 + torch.randn(200_000, generator=random, dtype=torch.float64)) * torch.where(flipped, -1.0, 1.0)
    found = flip_probability(gaps, Moments(float(gaps.mean()), float(gaps.std())), 0.15)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (found >= low) & (found < low + 0.2)
        assert float(flipped[inside].double().mean()) == pytest.approx(float(found[inside].mean()), abs=0.02)


def test_before_the_policy_knows_anything_all_pairs_are_alike() -> None:
    gaps = torch.tensor([-3.0, 0.0, 2.0])
    for blind in (Moments(0.0, 1.0), Moments(-0.4, 1.0), Moments(1.0, None), Moments(1.0, 0.0)):
        assert flip_probability(gaps, blind, 0.15).tolist() == pytest.approx([0.15] * 3)
    assert flip_probability(gaps, Moments(1.0, 1.0), 0.0).tolist() == [0.0] * 3


def test_moments_that_do_not_fit_together_take_the_smallest_spread() -> None:
    # 15 % of flipped pairs around ±2.86 would spread more than 2: s² would be negative
    found = flip_probability(torch.tensor([-0.1]), Moments(2.0, 2.0), 0.15)
    mean, variance = 2.0 / 0.7, SMALLEST_SPREAD * 4.0
    odds = math.log(0.15 / 0.85) + 2 * mean * 0.1 / variance
    assert float(found) == pytest.approx(1 / (1 + math.exp(-odds)), rel=1e-6)


@given(
    gaps=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=20),
    mean=st.floats(-5, 50),
    std=st.floats(0, 50),
    rate=st.floats(0, 0.49),
)
def test_probabilities_and_weights_stay_in_bounds(gaps: list[float], mean: float, std: float, rate: float) -> None:
    column = torch.tensor(gaps, dtype=torch.float64)
    found = flip_probability(column, Moments(mean, std), rate)
    assert bool(((found >= 0) & (found <= 1)).all())
    order = column.argsort()
    assert bool((found[order].diff() <= 1e-12).all())  # a larger gap never looks more flipped
    kept = torch.ones(len(gaps), dtype=torch.bool)
    weights = flip_weights(found, kept)
    assert bool((weights >= 0).all())
    assert float(weights.mean()) == pytest.approx(1.0)


def test_weights_are_means_over_the_kept_pairs() -> None:
    probability = torch.tensor([0.0, 0.25, 0.5, 0.9, math.nan], dtype=torch.float64)
    kept = torch.tensor([True, True, True, False, False])
    assert flip_weights(probability, kept).tolist() == pytest.approx([2.0, 1.0, 0.0, 0.0, 0.0])
    assert flip_weights(torch.full((3,), 0.5), torch.ones(3, dtype=torch.bool)).tolist() == [1.0] * 3
    assert flip_weights(torch.zeros(2), torch.zeros(2, dtype=torch.bool)).tolist() == [1.0, 1.0]


def test_a_pair_without_a_gap_has_no_probability() -> None:
    assert flip_probability(torch.tensor([math.nan, 1.0]), Moments(1.0, 1.0), 0.15).isnan().tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize("rate", [-0.1, 0.5, 1.0])
def test_a_rate_of_half_or_more_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="flip_rate"):
        flip_probability(torch.zeros(2), Moments(1.0, 1.0), rate)
