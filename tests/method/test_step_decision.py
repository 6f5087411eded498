"""The record of a step: it starts as plain DPO and keeps bad gaps out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_runs import decision_on, gaps_only

from app.method.dynamic_beta import (
    RunningMoments,
    batch_beta,
    gaussian_log_weights,
    gumbel_top_k,
    number_kept,
    selection_noise,
)
from app.method.losses import IPOLoss, SigmoidLoss
from app.method.step import StepDecision


def start(*gaps: float, beta0: float = 0.1) -> StepDecision:
    return decision_on(gaps, 4, beta0)


def test_starts_as_plain_dpo() -> None:
    decision = start(1.0, -2.0, 0.5)
    assert decision.step == 4
    assert decision.kept.tolist() == [True] * 3
    assert decision.beta.tolist() == [0.1] * 3
    assert decision.gaps.dtype == decision.discrepancy.dtype == decision.beta.dtype == torch.float64
    assert decision.moments is None
    assert decision.log_weights is None
    assert decision.labels == {}
    assert (decision.kept_count, decision.kept_fraction) == (3, 1.0)
    assert decision.beta_used == pytest.approx(0.1, abs=1e-15)


def test_gaps_leave_the_graph_and_are_not_shared() -> None:
    gaps = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    decision = StepDecision(0, ["a", "b"], gaps_only(gaps), SigmoidLoss(), 0.1)
    assert not decision.gaps.requires_grad
    decision.discrepancy *= 10
    decision.kept[0] = False
    assert decision.gaps.tolist() == gaps.tolist() == [1.0, 2.0]
    assert decision.eligible.tolist() == [True, True]


def test_a_gap_that_is_not_finite_is_not_eligible() -> None:
    decision = start(1.0, math.nan, 3.0, math.inf)
    assert decision.eligible.tolist() == decision.kept.tolist() == [True, False, True, False]
    assert decision.kept_count == 2
    assert decision.kept_fraction == 0.5  # of all pairs, not of the eligible ones
    assert decision.kept_discrepancy.tolist() == [1.0, 3.0]


def test_beta_used_is_the_mean_over_the_kept_pairs() -> None:
    decision = start(1.0, 2.0, 3.0)
    decision.beta = torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
    decision.kept = torch.tensor([True, False, True])
    assert decision.beta_used == pytest.approx(0.2)


def test_nothing_kept_and_nothing_there() -> None:
    decision = start(math.nan, beta0=0.3)
    assert (decision.kept_count, decision.kept_fraction, decision.beta_used) == (0, 0.0, 0.3)
    empty = start(beta0=0.3)
    assert (empty.kept_count, empty.kept_fraction, empty.beta_used) == (0, 0.0, 0.3)


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="pair_ids has 1 entries for 2 gaps"):
        StepDecision(0, ["a"], gaps_only(torch.zeros(2)), SigmoidLoss(), 0.1)
    with pytest.raises(ValueError, match="flipped has 3 entries"):
        decision_on([0.0, 0.0], labels={"flipped": [True, False, True]})


def test_labels_travel_along() -> None:
    decision = decision_on([0.0, 0.0], labels={"flipped": [True, False]})
    assert decision.labels["flipped"] == [True, False]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("kept", torch.zeros(3, dtype=torch.bool), "at least one pair"),
        ("kept", torch.tensor([1, 0, 0]), "at least one pair"),  # would be read as indices
        ("kept", torch.ones(3, dtype=torch.bool), "none without a finite gap"),
        ("kept", torch.ones(2, dtype=torch.bool), "each of the 3 pairs"),
        ("beta", 0.2, "each of the 3 pairs"),
        ("beta", torch.tensor(0.2), "each of the 3 pairs"),
        ("beta", torch.tensor([0.2, math.nan, 0.2]), "beta is not finite"),
        ("beta", torch.tensor([0.2, -0.2, 0.2]), "beta is not above 0"),
        ("loss_weight", torch.tensor([1.0, math.inf, 1.0]), "loss_weight is not finite"),
        ("margin", torch.tensor([0.0, math.nan, 0.0]), "margin is not finite"),
        ("gaps", torch.tensor([0.5, 0.2, math.nan]), "gaps are the measured ones and must stay"),
        ("gaps", start(0.5, 0.1, 0.0).gaps, "gaps are the measured ones and must stay"),
        ("gaps", [0.5, 0.1, math.nan], "each of the 3 pairs"),
    ],
)
def test_a_decision_that_cannot_be_trained_is_named(name: str, value: Any, said: str) -> None:
    decision = start(0.5, 0.1, math.nan)
    assert decision.fault() == ""
    setattr(decision, name, value)
    assert said in decision.fault()


@pytest.mark.parametrize(
    "gaps",
    [
        [0.0] * 8,
        [50.0] * 8,
        [1.0],
        [1.0, 2.0],
        [0.2, -0.1, 0.4, 1e6],
        [0.2, -0.1, 0.4, -1e6],
        [math.nan, 1.0, 2.0, 3.0],
        [math.nan],
        [],
    ],
    ids=["zeros", "constant", "one", "two", "high", "low", "nan", "only nan", "empty"],
)
def test_a_whole_step_on_degenerate_gaps(gaps: list[float]) -> None:
    decision = start(*gaps)
    values = decision.discrepancy[decision.eligible]
    decision.moments = RunningMoments().update(values)
    decision.log_weights = gaussian_log_weights(decision.discrepancy, decision.moments)
    k = number_kept(values.numel(), 0.8)
    noise = selection_noise(0, decision.step, len(gaps))
    decision.kept = gumbel_top_k(decision.log_weights, k, noise)
    decision.beta.fill_(batch_beta(0.1, 0.6, decision.kept_discrepancy, decision.moments))
    assert decision.kept_count == k
    assert not (decision.kept & ~decision.eligible).any()
    assert math.isfinite(decision.beta_used)


def test_losses_take_each_pair_its_own_beta_weight_and_margin() -> None:
    gap = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    pairs = gaps_only(gap)
    decision = start(*gap.tolist())
    everywhere = torch.arange(3)
    plain = SigmoidLoss()(pairs, decision.beta)
    same = decision.weighted_losses(pairs, decision.terms(everywhere))
    assert torch.equal(same, plain)  # plain DPO to the bit
    decision.beta = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    decision.loss_weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    decision.margin = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
    chosen = torch.tensor([2, 1])
    losses = decision.weighted_losses(pairs.select(chosen), decision.terms(chosen))
    expected = [3 * math.log1p(math.exp(-0.15 - 0.5)), 2 * math.log1p(math.exp(0.4 + 0.5))]
    assert losses.tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="IPOLoss has no logit"):
        replace(decision, loss=IPOLoss()).weighted_losses(pairs, decision.terms(everywhere))
