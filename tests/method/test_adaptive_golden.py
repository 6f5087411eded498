"""Adaptive methods against golden numbers (float64, 1e-9)."""

from __future__ import annotations

import pytest
import torch
from golden import golden_numbers

from app.method.logps import PairLogps
from app.method.losses import AlphaDPOLoss


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_alpha_dpo_as_published() -> None:
    for case in golden_numbers("adaptive")["alpha_dpo"]:
        policy, gap = column(case["policy_gap"]), column(case["gap_with_reference"])
        zero, one = torch.zeros_like(gap), torch.ones(gap.shape, dtype=torch.int64)
        pairs = PairLogps(policy.requires_grad_(), zero, policy.detach() - gap, zero, one, one)
        loss = AlphaDPOLoss(case["alpha"], case["gamma"]).for_batch(pairs)
        beta = torch.full_like(gap, case["beta"])
        seen = loss(pairs, beta)
        assert seen.tolist() == pytest.approx(case["loss"], rel=1e-9, abs=1e-12)
        seen.sum().backward()  # the logit alone carries the gradient, −β·σ(−logit): z is a constant
        assert policy.grad is not None
        logit = column(case["logit"])
        assert policy.grad.tolist() == pytest.approx((-case["beta"] * torch.sigmoid(-logit)).tolist(), rel=1e-9)


def test_alpha_dpo_without_a_spread_is_simpo() -> None:
    equal = column([-3.0, -2.0])
    pairs = PairLogps(equal, equal - 1, equal, equal - 1, *[torch.tensor([2, 4])] * 2)
    loss = AlphaDPOLoss(0.2, 1.0)
    with pytest.raises(ValueError, match="for_batch first"):
        loss(pairs, column([2.0, 2.0]))
    expected = -torch.nn.functional.logsigmoid(2.0 * pairs.normalised_gap - 1.0)
    assert loss.for_batch(pairs)(pairs, column([2.0, 2.0])).tolist() == pytest.approx(expected.tolist())
