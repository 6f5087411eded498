"""ε-DPO: steps from three gaps, the β that follows, and what the perturbed logits stand for."""

from __future__ import annotations

import math

import pytest
import torch

from app.method.dynamic_beta import epsilon_beta, epsilon_steps, next_epsilon_beta, perturbed_logits


def test_only_strictly_monotone_gaps_make_a_step() -> None:
    table = torch.tensor(
        [
            [1.0, 2.0, 3.0],  # rises
            [3.0, 2.0, 1.0],  # falls
            [1.0, 3.0, 2.0],  # peak
            [2.0, 1.0, 3.0],  # dip
            [1.0, 1.0, 2.0],  # flat, then up
            [1.0, 2.0, 2.0],  # up, then flat
            [2.0, 2.0, 1.0],  # flat, then down
            [2.0, 1.0, 1.0],  # down, then flat
            [5.0, 5.0, 5.0],
            [1.0, math.nan, 3.0],
        ]
    )
    steps = epsilon_steps(table[:, 0], table[:, 1], table[:, 2])
    assert steps.dtype == torch.int64
    assert steps.tolist() == [1, -1] + [0] * 8


def test_beta_by_hand() -> None:
    steps = torch.tensor([1, -1, 0])
    betas = epsilon_beta(0.2, 0.25, steps)
    assert betas.dtype == torch.float64
    assert betas.tolist() == pytest.approx([0.16, 0.2 / 0.75, 0.2], abs=1e-15)


def test_next_beta_follows_the_mean_step() -> None:
    assert next_epsilon_beta(0.2, 0.25, torch.tensor([1, 1, 1, -1])) == pytest.approx(0.2 / 1.125)
    assert next_epsilon_beta(0.2, 0.25, torch.tensor([1, -1])) == 0.2
    assert next_epsilon_beta(0.2, 0.25, torch.tensor([-1])) > 0.2
    assert next_epsilon_beta(0.2, 0.25, torch.empty(0, dtype=torch.int64)) == 0.2


def test_perturbed_logits_are_the_policy_of_another_beta() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    reward = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    beta, epsilon = 0.3, 0.2

    def optimum(at: float) -> torch.Tensor:  # π ∝ π_ref·exp(r/β)
        return torch.log_softmax(reference + reward / at, dim=-1)

    for sign in (1.0, -1.0):
        perturbed = perturbed_logits(optimum(beta), torch.log_softmax(reference, dim=-1), sign * epsilon)
        expected = optimum(beta / (1 + sign * epsilon))
        torch.testing.assert_close(torch.log_softmax(perturbed, dim=-1), expected)


def test_a_policy_that_equals_its_reference_is_not_perturbed() -> None:
    logits = torch.tensor([0.5, -2.0, 7.0], dtype=torch.float64)
    assert torch.equal(perturbed_logits(logits, logits, 0.01), logits)
