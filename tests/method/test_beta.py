"""β at batch and at instance level, its bounds, and that no gradient flows through it."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.method.dynamic_beta import Moments, batch_beta, instance_beta
from app.method.margins import standardised_margin
from callbacks.dynamic_beta import BetaScheduler, BoundedBeta

AFTER = Moments(mean=0.9875, std=1.9430690)
GAPS = torch.tensor([2.0, -1.5, 1.0, 2.0], dtype=torch.float64)


def test_batch_beta_by_hand() -> None:
    full = batch_beta(0.1, 0.6, GAPS, AFTER)
    assert full.shape == ()
    assert full.dtype == torch.float64
    assert full.item() == pytest.approx(0.09325, abs=1e-12)  # 0.1·(1 + 0.6·(0.875 − 0.9875))
    assert batch_beta(0.1, 0.6, GAPS, Moments(1.0, 2.0)).item() == pytest.approx(0.0925, abs=1e-12)


def test_batch_beta_looks_at_the_kept_pairs_only() -> None:
    kept = GAPS[[0, 2, 3]]  # mean 5/3
    assert batch_beta(0.1, 0.6, kept, AFTER).item() == pytest.approx(0.14075, abs=1e-12)


def test_gaps_scaled_by_beta0_make_alpha_ten_times_weaker() -> None:
    scaled = batch_beta(0.1, 0.6, 0.1 * GAPS, Moments(0.09875, 0.194))
    assert scaled.item() == pytest.approx(0.099325, abs=1e-12)


@pytest.mark.parametrize(
    ("kept_mean", "running_mean", "unclamped", "beta"),
    [
        (3.0, 1.0, 0.22, 0.22),
        (1.0, 1.0, 0.1, 0.1),
        (5.0, 0.0, 0.4, 0.4),
        (-1.0, 1.0, -0.02, 0.001),
        (-2.0, 1.0, -0.08, 0.001),
        (0.0, 10.0, -0.5, 0.001),
        (-2 / 3, 1.0, 0.0, 0.001),
    ],
)
def test_floor(kept_mean: float, running_mean: float, unclamped: float, beta: float) -> None:
    raw = batch_beta(0.1, 0.6, torch.tensor([kept_mean], dtype=torch.float64), Moments(running_mean, 1.0))
    assert raw.item() == pytest.approx(unclamped, abs=1e-12)
    assert raw.clamp(*BoundedBeta().bounds(0.1)).item() == pytest.approx(beta, abs=1e-12)


def test_instance_beta_by_hand() -> None:
    raw = instance_beta(0.1, 0.6, torch.tensor([-1.0, 0.0, 1.0, 4.0]), Moments(1.2, None))
    assert raw.tolist() == pytest.approx([-0.032, 0.028, 0.088, 0.268], abs=1e-9)
    assert raw.clamp(*BoundedBeta().bounds(0.1)).tolist() == pytest.approx([0.001, 0.028, 0.088, 0.268], abs=1e-9)
    narrow = raw.clamp(*BoundedBeta(0.5, 2.0).bounds(0.1))
    assert narrow.tolist() == pytest.approx([0.05, 0.05, 0.088, 0.2], abs=1e-9)


def test_instance_beta_averages_to_the_batch_beta_of_the_same_pairs() -> None:
    mean = instance_beta(0.1, 0.6, GAPS, AFTER).mean().item()
    assert mean == pytest.approx(batch_beta(0.1, 0.6, GAPS, AFTER).item(), abs=1e-15)


def test_a_nan_spoils_its_own_pair_only() -> None:
    betas = instance_beta(0.1, 0.6, torch.tensor([1.0, math.nan, 2.0]), Moments(1.0, 1.0))
    assert betas.isnan().tolist() == [False, True, False]


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(-1e6, 1e6), max_size=8),
    mean=st.floats(-1e6, 1e6),
    beta0=st.floats(1e-3, 10.0),
)
def test_alpha_zero_is_beta0_to_the_bit(gaps: list[float], mean: float, beta0: float) -> None:
    values = torch.tensor(gaps, dtype=torch.float64)
    moments = Moments(mean, 1.0)
    assert batch_beta(beta0, 0.0, values, moments).item() == beta0
    assert instance_beta(beta0, 0.0, values, moments).tolist() == [beta0] * len(gaps)


def test_no_pair_kept_is_beta0() -> None:
    assert batch_beta(0.1, 0.6, torch.empty(0), Moments(5.0, 1.0)).item() == 0.1


def test_beta_is_outside_the_graph() -> None:
    gaps = GAPS.clone().requires_grad_()
    assert not batch_beta(0.1, 0.6, gaps, AFTER).requires_grad
    assert not instance_beta(0.1, 0.6, gaps, AFTER).requires_grad


def test_wide_gaps_often_reach_the_floor() -> None:
    # β ≤ 0.001 needs a mean of 1.65 below M0, 1.18 standard errors of 51 gaps with standard deviation 10.
    generator = torch.Generator().manual_seed(0)
    batches = 10 * torch.randn(4000, 51, generator=generator, dtype=torch.float64)
    hits = sum(batch_beta(0.1, 0.6, batch, Moments(0.0, 10.0)).item() <= 1e-3 for batch in batches)
    assert 0.10 < hits / 4000 < 0.14


def test_bounds_are_multiples_of_beta0() -> None:
    for beta0 in (0.01, 0.1, 2.5):
        assert BetaScheduler(floor=0.2, ceiling=5.0).bounds(beta0) == pytest.approx((0.2 * beta0, 5 * beta0))
        assert BoundedBeta().bounds(beta0) == (0.01 * beta0, None)


ALL = torch.ones(4, dtype=torch.bool)
SOME = torch.tensor([True, False, True, True])
HAND = Moments(mean=0.5, std=2.0)  # z-scores of GAPS: 0.75, −1, 0.25, 0.75


@pytest.mark.parametrize(
    ("schedule", "kept", "expected"),
    [
        (BetaScheduler(0.6), SOME, [0.17] * 4),  # mean 5/3: 0.1·(1 + 0.6·7/6)
        (BetaScheduler(0.6), ALL, [0.1225] * 4),
        (BetaScheduler(0.6, level="instance"), SOME, [0.19, -0.02, 0.13, 0.19]),
        (BetaScheduler(0.6, m0=1.0), SOME, [0.14] * 4),
        (BetaScheduler(0.6, level="instance", m0=1.0), SOME, [0.16, -0.05, 0.1, 0.16]),
        (BetaScheduler(0.6, z_normalised=True), SOME, [0.135] * 4),  # mean z 7/12
        (BetaScheduler(0.6, level="instance", z_normalised=True), ALL, [0.145, 0.04, 0.115, 0.145]),
        (BetaScheduler(0.6, m0=-0.5, z_normalised=True), SOME, [0.165] * 4),  # mean 5/3 + 1/2 over 2
    ],
)
def test_schedules_by_hand(schedule: BetaScheduler, kept: torch.Tensor, expected: list[float]) -> None:
    beta = schedule.beta(0.1, GAPS, kept, HAND)
    assert beta.dtype == torch.float64
    assert beta.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("std", [None, 0.0, 9e-7])
def test_without_a_spread_the_normalised_schedule_and_the_margin_rest(std: float | None) -> None:
    start = Moments(0.0, std)
    assert BetaScheduler(z_normalised=True).beta(0.1, GAPS, ALL, start).tolist() == [0.1] * 4
    assert standardised_margin(0.3, 0.5, GAPS, start).tolist() == [0.3] * 4


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100), level=st.sampled_from(["batch", "instance"]))
def test_the_normalised_schedule_ignores_scale_and_origin(scale: float, shift: float, level: Any) -> None:
    schedule = BetaScheduler(0.6, level=level, z_normalised=True)
    plain = schedule.beta(0.1, GAPS, SOME, HAND)
    moved = schedule.beta(0.1, scale * GAPS + shift, SOME, Moments(scale * 0.5 + shift, scale * 2.0))
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("level", ["batch", "instance"])
@pytest.mark.parametrize("normalised", [False, True])
def test_alpha_zero_is_beta0_under_every_schedule(level: Literal["batch", "instance"], normalised: bool) -> None:
    schedule = BetaScheduler(0.0, level=level, z_normalised=normalised)
    assert schedule.beta(0.3, GAPS, SOME, HAND).tolist() == [0.3] * 4


def test_margin_by_hand_and_outside_the_graph() -> None:
    gaps = GAPS.clone().requires_grad_()
    margin = standardised_margin(1.0, 0.2, gaps, HAND)
    assert margin.tolist() == pytest.approx([1.15, 0.8, 1.05, 1.15], abs=1e-12)
    assert not margin.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        *({"alpha": math.nan}, {"alpha": math.inf}, {"m0": math.inf}, {"m0": math.nan}, {"level": "pair"}),
        *({"floor": bad} for bad in (0.0, -1.0, math.nan, math.inf, 1.01)),
        *({"ceiling": bad} for bad in (0.99, math.inf, math.nan)),
    ],
)
def test_a_schedule_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BetaScheduler(**wrong)
    if not wrong.keys() <= {"floor", "ceiling"}:
        return
    with pytest.raises(ValueError, match=f"BoundedBeta: {next(iter(wrong))}"):
        BoundedBeta(**wrong)


@pytest.mark.parametrize("m0", [None, 0.02])
def test_z_scores_of_a_spread_that_rounding_explains_leave_beta_at_its_base(m0: float | None) -> None:
    rounded = Moments(0.0, 0.06, minimum_std=0.08)  # as in bfloat16
    schedule = BetaScheduler(0.6, m0=m0, z_normalised=True)
    assert schedule.beta(0.1, 0.06 * GAPS, ALL, rounded).tolist() == [0.1] * 4
