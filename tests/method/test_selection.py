"""The filter: Gaussian weights in log space, the rule for k, keyed noise, and the law of Gumbel-top-k."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.method.dynamic_beta import (
    Moments,
    RunningMoments,
    effective_sample_size,
    gaussian_log_weights,
    gumbel_top_k,
    keep_by_gradient_scale,
    number_kept,
    selection_noise,
)

GAPS = torch.tensor([2.0, -1.5, 1.0, 2.0], dtype=torch.float64)


def draw(log_weights: torch.Tensor, k: int, seed: int, draws: int) -> torch.Tensor:
    """How often each pair is kept in `draws` selections, [G]."""
    counts = torch.zeros(log_weights.numel(), dtype=torch.int64)
    for step in range(draws):
        counts += gumbel_top_k(log_weights, k, selection_noise(seed, step, log_weights.numel()))
    return counts / draws


def inclusion_by_enumeration(weights: list[float], k: int) -> list[float]:
    """Exact probability of each item being among k successive draws without replacement."""
    included = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), k):
        left, probability = sum(weights), 1.0
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        for item in order:
            included[item] += probability
    return included


def assert_within_three_standard_errors(seen: torch.Tensor, exact: list[float], draws: int) -> None:
    for frequency, probability in zip(seen.tolist(), exact, strict=True):
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(frequency - probability) <= 3 * error


@pytest.mark.parametrize(
    ("std", "weights"),
    [
        (1.9652020, [0.8757078, 0.4488390, 0.9999798, 0.8757078]),  # Bessel's correction
        (1.9430690, [0.8730489, 0.4406768, 0.9999793, 0.8730489]),  # population
    ],
)
def test_gaussian_weights_by_hand(std: float, weights: list[float]) -> None:
    log_weights = gaussian_log_weights(GAPS, Moments(mean=0.9875, std=std))
    assert log_weights.dtype == torch.float64
    assert log_weights.exp().tolist() == pytest.approx(weights, abs=1e-6)


def test_one_and_two_standard_deviations() -> None:
    log_weights = gaussian_log_weights(torch.tensor([3.0, 5.0, -1.0, 1.0]), Moments(mean=1.0, std=2.0))
    assert log_weights.tolist() == [-0.5, -2.0, -0.5, 0.0]


def test_the_normal_density_gives_the_same_selection_as_its_exponent() -> None:
    log_weights = gaussian_log_weights(GAPS, Moments(mean=0.9875, std=1.9430690))
    density = torch.distributions.Normal(0.9875, 1.9430690).log_prob(GAPS)
    assert density.exp().tolist() == pytest.approx([0.1792505, 0.0904777, 0.2053114, 0.1792505], abs=1e-6)
    for step in range(50):
        noise = selection_noise(0, step, 4)
        assert torch.equal(gumbel_top_k(density, 2, noise), gumbel_top_k(log_weights, 2, noise))


@pytest.mark.parametrize("std", [None, 0.0, 9e-7])
def test_without_a_usable_spread_all_pairs_are_equally_likely(std: float | None) -> None:
    assert gaussian_log_weights(GAPS, Moments(mean=40.0, std=std)).tolist() == [0.0] * 4


def test_a_spread_just_above_the_limit_is_used() -> None:
    values = torch.tensor([0.0, 2e-6], dtype=torch.float64)
    assert gaussian_log_weights(values, Moments(0.0, 1e-6)).tolist() == pytest.approx([0.0, -2.0])
    assert gaussian_log_weights(values, Moments(0.0, 1e-6, minimum_std=1e-5)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("std", [None, 2.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_discrepancy_that_is_not_finite_has_no_weight(std: float | None, bad: float) -> None:
    log_weights = gaussian_log_weights(torch.tensor([0.0, bad, 1.0]), Moments(0.0, std))
    assert log_weights[1] == -math.inf
    assert torch.isfinite(log_weights[[0, 2]]).all()


@settings(max_examples=30, deadline=None)
@given(
    gaps=st.lists(st.floats(-50, 50), min_size=1, max_size=12),
    mean=st.floats(-20, 20),
    std=st.floats(0.5, 20),
    scale=st.sampled_from([0.01, 0.1, 3.0, 40.0]),
)
def test_the_scale_of_a_reward_model_does_not_change_the_filter(
    gaps: list[float], mean: float, std: float, scale: float
) -> None:
    values = torch.tensor(gaps, dtype=torch.float64)
    plain = gaussian_log_weights(values, Moments(mean, std))
    scaled = gaussian_log_weights(scale * values, Moments(scale * mean, scale * std))
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("n", "keep_ratio", "k"),
    [
        (64, 0.8, 51),
        (32, 0.8, 25),
        (8, 0.8, 6),
        (5, 0.8, 4),
        (4, 0.8, 3),
        (2, 0.8, 1),
        (1, 0.8, 1),
        (10, 1 - 0.9, 1),  # int(10·(1 − 0.9)) is 0 in floating point
        (20, 0.1, 2),
        (100, 0.1, 10),
        (100, 0.29, 29),  # 28.999999999999996
        (3, 0.01, 1),
        (7, 1.0, 7),
        (0, 0.8, 0),
        (0, 1.0, 0),
    ],
)
def test_the_rule_for_k(n: int, keep_ratio: float, k: int) -> None:
    assert number_kept(n, keep_ratio) == k


@pytest.mark.parametrize("keep_ratio", [0.0, -0.2, 1.01, math.nan])
def test_a_keep_ratio_out_of_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(ValueError, match="keep_ratio"):
        number_kept(8, keep_ratio)


def test_noise_depends_on_seed_and_step_only() -> None:
    torch.manual_seed(1)
    first = selection_noise(7, 3, 64)
    torch.rand(1000)  # another rank has used more of the global stream
    torch.manual_seed(2)
    assert torch.equal(selection_noise(7, 3, 64), first)
    assert first.dtype == torch.float64
    assert first.shape == (64,)


def test_noise_leaves_the_global_random_state_untouched() -> None:
    before = torch.get_rng_state()
    gumbel_top_k(torch.zeros(16), 5, selection_noise(0, 0, 16))
    assert torch.equal(torch.get_rng_state(), before)


def test_neighbouring_keys_are_unrelated() -> None:
    keys = [*itertools.product(range(12), range(12)), (1, 11), (11, 1), (2**63, 0), (-1, 0)]
    noise = torch.stack([selection_noise(seed, step, 400) for seed, step in dict.fromkeys(keys)])
    correlation = torch.corrcoef(noise) - torch.eye(noise.shape[0], dtype=torch.float64)
    assert correlation.abs().max() < 6 / math.sqrt(400)


def test_noise_is_uniform() -> None:
    noise = torch.cat([selection_noise(3, step, 200) for step in range(100)])
    assert ((noise > 0) & (noise < 1)).all()
    counts = torch.histc(noise, bins=10, min=0.0, max=1.0)
    assert ((counts - 2000).square() / 2000).sum() < 27.9  # χ², 9 degrees of freedom, p = 0.001


def test_inclusion_probabilities_of_the_filter() -> None:
    moments = Moments(mean=0.0, std=2.0)
    log_weights = gaussian_log_weights(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]), moments)
    exact = inclusion_by_enumeration(log_weights.exp().tolist(), 4)
    assert exact == pytest.approx([0.6136195, 0.9181983, 0.9363645, 0.9181983, 0.6136195], abs=1e-6)
    # Five cells at three standard errors fail by chance for one seed in seventy (11 is one: 3.07). 20 other seeds
    # of 20,000 draws pooled agree to 0.8 standard errors, so the seed is fixed and the bound stays.
    assert_within_three_standard_errors(draw(log_weights, 4, seed=0, draws=20_000), exact, 20_000)


@pytest.mark.slow
def test_inclusion_probabilities_of_a_lopsided_batch() -> None:
    log_weights = torch.tensor([0.0, -0.3, -1.0, -2.5, -4.0, -0.1], dtype=torch.float64)
    exact = inclusion_by_enumeration(log_weights.exp().tolist(), 2)
    assert sum(exact) == pytest.approx(2.0)
    assert_within_three_standard_errors(draw(log_weights, 2, seed=5, draws=20_000), exact, 20_000)


def test_equal_weights_are_a_random_filter() -> None:
    seen = draw(torch.zeros(10), 8, seed=2, draws=5_000)
    assert_within_three_standard_errors(seen, [0.8] * 10, 5_000)


weight_lists = st.lists(st.floats(-1e15, 0.0) | st.just(-math.inf), max_size=20)


@settings(max_examples=60, deadline=None)
@given(weights=weight_lists, data=st.data(), step=st.integers(0, 2**40))
def test_exactly_k_are_kept_and_weightless_pairs_come_last(
    weights: list[float], data: st.DataObject, step: int
) -> None:
    k = data.draw(st.integers(0, len(weights)))
    log_weights = torch.tensor(weights, dtype=torch.float64)
    kept = gumbel_top_k(log_weights, k, selection_noise(0, step, len(weights)))
    assert kept.dtype == torch.bool
    assert int(kept.sum()) == k
    finite = torch.isfinite(log_weights)
    assert int(kept[finite].sum()) == min(k, int(finite.sum()))


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(-20, 0), min_size=1, max_size=20),
    shift=st.sampled_from([-1e4, 1e4, 123.25]),
    step=st.integers(0, 1000),
)
def test_a_shift_of_all_log_weights_changes_nothing(weights: list[float], shift: float, step: int) -> None:
    log_weights = torch.tensor(weights, dtype=torch.float64)
    noise = selection_noise(9, step, len(weights))
    k = number_kept(len(weights), 0.5)
    assert torch.equal(gumbel_top_k(log_weights + shift, k, noise), gumbel_top_k(log_weights, k, noise))


def test_weights_far_below_underflow_still_follow_their_ratio() -> None:
    # e^−5000 is 0 in float64; the two pairs' odds are e : 1 all the same.
    log_weights = torch.tensor([-5000.0, -5001.0], dtype=torch.float64)
    probability = math.e / (1 + math.e)
    seen = draw(log_weights, 1, seed=4, draws=5_000)
    assert_within_three_standard_errors(seen, [probability, 1 - probability], 5_000)


@pytest.mark.parametrize(
    ("gaps", "moments"),
    [
        ([0.0] * 8, Moments(0.0, 0.0)),  # policy equals reference
        ([50.0] * 8, Moments(50.0, 0.0)),
        ([1.0], Moments(1.0, None)),
        ([1.0, 2.0], Moments(1.5, 0.5)),
        ([0.1, -0.2, 0.3, 0.0, 1e6], Moments(0.0, 1.0)),
        ([0.1, -0.2, 0.3, 0.0, -1e6], Moments(0.0, 1.0)),
        ([50.0, 50.1, 49.9, 50.2, 49.8], Moments(0.0, 0.1)),  # 500 σ away: every weight underflows
        ([50.0, 50.1, 49.9, 50.2, 49.8], Moments(0.0, 2e-6)),
        ([], Moments(0.0, None)),
    ],
)
def test_degenerate_batches_never_crash(gaps: list[float], moments: Moments) -> None:
    values = torch.tensor(gaps, dtype=torch.float64)
    log_weights = gaussian_log_weights(values, moments)
    assert torch.isfinite(log_weights).all()
    k = number_kept(len(gaps), 0.8)
    assert int(gumbel_top_k(log_weights, k, selection_noise(0, 0, len(gaps))).sum()) == k


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(st.lists(st.floats(-1e6, 1e6), max_size=9), min_size=1, max_size=4))
def test_no_sequence_of_finite_batches_gives_a_nan(batches: list[list[float]]) -> None:
    running = RunningMoments()
    for batch in batches:
        values = torch.tensor(batch, dtype=torch.float64)
        log_weights = gaussian_log_weights(values, running.update(values))
        assert torch.isfinite(log_weights).all()
        assert math.isfinite(effective_sample_size(log_weights))


def test_an_outlier_is_the_pair_that_is_left_out() -> None:
    values = torch.tensor([0.1, -0.2, 0.3, 0.0, 1e6], dtype=torch.float64)
    log_weights = gaussian_log_weights(values, Moments(0.0, 1.0))
    for step in range(20):
        kept = gumbel_top_k(log_weights, 4, selection_noise(0, step, 5))
        assert kept.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("weights", "k", "noise", "message"),
    [
        ([0.0, 0.0], 3, [0.5, 0.5], "3 of 2"),
        ([0.0, 0.0], -1, [0.5, 0.5], "-1 of 2"),
        ([0.0, 0.0], 1, [0.5], "2 weights"),
        ([0.0, math.nan], 1, [0.5, 0.5], "finite"),
        ([0.0, math.inf], 1, [0.5, 0.5], "finite"),
        ([0.0, 0.0], 1, [0.0, 0.5], "open interval"),
        ([0.0, 0.0], 1, [0.5, 1.0], "open interval"),
    ],
)
def test_what_would_break_the_law_is_refused(
    weights: list[float], k: int, noise: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gumbel_top_k(torch.tensor(weights), k, torch.tensor(noise, dtype=torch.float64))


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size(torch.zeros(7)) == pytest.approx(7.0)
    # Weights 2 and 1: 9/5. A constant shift far below underflow changes nothing.
    assert effective_sample_size(torch.tensor([math.log(2.0), 0.0]) - 3000) == pytest.approx(1.8, abs=1e-3)
    assert effective_sample_size(torch.tensor([math.log(2.0), 0.0])) == pytest.approx(1.8)
    assert effective_sample_size(torch.tensor([0.0, -1e9, -math.inf])) == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([-math.inf])) == 0.0
    assert effective_sample_size(torch.empty(0)) == 0.0


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(-1e9, 0.0), min_size=1, max_size=20))
def test_effective_sample_size_lies_between_one_and_all(weights: list[float]) -> None:
    size = effective_sample_size(torch.tensor(weights, dtype=torch.float64))
    assert 1.0 - 1e-9 <= size <= len(weights) + 1e-9


FIVE = torch.tensor([2.0, -4.0, 6.0, -1.0, 0.0], dtype=torch.float64)  # σ(−0.1·h) .4502 .5987 .3543 .5250 .5


@pytest.mark.parametrize(
    ("drop", "k", "dropped"),
    [
        ("head", 4, {1}),
        ("tail", 4, {2}),
        ("both", 4, {1}),  # the odd one from the head
        ("head", 3, {1, 3}),
        ("tail", 3, {2, 0}),
        ("both", 3, {1, 2}),
        ("both", 2, {1, 3, 2}),
        ("both", 5, set()),
    ],
)
def test_filters_by_gradient_scale_by_hand(drop: Any, k: int, dropped: set[int]) -> None:
    kept = keep_by_gradient_scale(FIVE, k, drop, selection_noise(0, 0, 5))
    assert set((~kept).nonzero().flatten().tolist()) == dropped


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.one_of(st.floats(-20, 20), st.sampled_from([math.nan, math.inf, 0.0])), max_size=14),
    ratio=st.floats(0.05, 1.0),
    drop=st.sampled_from(["head", "tail", "both"]),
    step=st.integers(0, 50),
)
def test_filters_by_gradient_scale_keep_k_and_never_a_more_extreme_pair(
    gaps: list[float], ratio: float, drop: Any, step: int
) -> None:
    values = torch.tensor(gaps, dtype=torch.float64)
    finite = torch.isfinite(values)
    k = number_kept(int(finite.sum()), ratio)
    kept = keep_by_gradient_scale(values, k, drop, selection_noise(1, step, len(gaps)))
    assert int(kept.sum()) == k
    assert not (kept & ~finite).any()
    left = values[finite & ~kept]
    if k:
        below, above = (left <= values[kept].min()), (left >= values[kept].max())
        assert {"head": below, "tail": above, "both": below | above}[drop].all()


def test_equal_gaps_are_dropped_by_the_draw_and_not_by_place() -> None:
    ties = torch.zeros(10, dtype=torch.float64)
    masks = {
        tuple(keep_by_gradient_scale(ties, 8, "head", selection_noise(0, step, 10)).tolist()) for step in range(20)
    }
    assert len(masks) > 10
    noise = selection_noise(0, 3, 10)
    assert torch.equal(
        keep_by_gradient_scale(ties, 8, "both", noise), keep_by_gradient_scale(ties, 8, "both", noise)
    )


def test_more_pairs_than_have_a_gap_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="cannot keep 2 of 1"):
        keep_by_gradient_scale(torch.tensor([1.0, math.nan]), 2, "head", selection_noise(0, 0, 2))
