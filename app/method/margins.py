"""Margins that are subtracted from the logits of a step's pairs; each is a constant to the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from app.method.dynamic_beta import MINIMUM_STD, Moments

ROUNDS = 500  # of the search for a root, enough for halving alone


def standardised_margin(gamma: float, alpha: float, discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return γ + α·(M_i − M0)/σ [G] float64, detached; γ without a `Moments.spread`."""
    return gamma + alpha * moments.z_scores(discrepancy)


def gamma_po_margins(reward_gaps: Tensor, gamma: float, temperature: float) -> Tensor:
    """Return γ_i = γ0·n·p_i with n·p_i ∝ exp(−(γ0/τ)·σ(γ_i − M_i)): [n] float64, with the mean γ0 = `gamma`.

    M [n] are `reward_gaps` in the units of the loss (β times the gap), τ is `temperature`. Confident pairs get a
    larger margin (γ-PO, arXiv 2506.03690). The authors (`scripts/xpo_trainer.py` in sunjie279/gammaPO) take steps
    of mirror descent; this is the fixed point that those steps approach.
    """
    gaps, strength = reward_gaps.detach().to(torch.float64), gamma / temperature
    top = math.log(gamma) + strength

    def logs(level: Tensor) -> tuple[Tensor, Tensor]:
        # u = log γ_i solves u + (γ0/τ)·σ(e^u − M_i) = level, whose left side rises with u
        def excess(u: Tensor) -> tuple[Tensor, Tensor]:
            doubt = torch.sigmoid(u.exp() - gaps)
            return u + strength * doubt - level, 1.0 + strength * doubt * (1.0 - doubt) * u.exp()

        u = _increasing_root(excess, (level - strength).expand_as(gaps), level.expand_as(gaps))
        return u, excess(u)[1]

    def mean_excess(level: Tensor) -> tuple[Tensor, Tensor]:
        u, slope = logs(level)
        return u.exp().mean() - gamma, (u.exp() / slope).mean()

    level = _increasing_root(mean_excess, gaps.new_tensor(math.log(gamma)), gaps.new_tensor(top))
    return logs(level)[0].exp()


def amapo_margins(gaps: Tensor, beta: Tensor) -> Tensor:
    """Return AMaPO's margin, β·exp(μ·(μ − h̄_i)/s) where h̄_i is below the mean μ, else 0: [n] float64.

    `gaps` h̄ [n] are length-normalised log-probability gaps without reference, s is their sample standard deviation,
    β [n] is `beta`. Without a spread no pair is below the mean. (arXiv 2511.09385; `amapo_loss` in
    Shiroha-Offical/AMaPO.)
    """
    gaps = gaps.detach().to(torch.float64)
    if gaps.numel() < 2 or (std := gaps.std()) < MINIMUM_STD:
        return torch.zeros_like(gaps)
    mean = gaps.mean()
    return torch.where(gaps < mean, beta * torch.exp((mean - gaps) / std * mean), 0.0)


def _increasing_root(function: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor) -> Tensor:
    """Return where `function`, (value, slope) of increasing functions, is 0 between `low` and `high`."""
    x = (low + high) / 2
    for number in range(ROUNDS):
        value, slope = function(x)
        low, high = torch.where(value <= 0, x, low), torch.where(value >= 0, x, high)
        newton = x - value / slope
        inside = (newton >= low) & (newton <= high)
        if bool(((newton - x).abs() <= 1e-12 * (1.0 + x.abs())).all()):
            return newton
        # every eighth step halves the bracket, so that the search ends in any case
        x = torch.where(inside, newton, (low + high) / 2) if (number + 1) % 8 else (low + high) / 2
    return x
