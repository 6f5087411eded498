"""Estimate from the gaps alone which labels are flipped, and weight pairs accordingly. Not in the paper.

A flipped label swaps the two responses of a pair, so its gap h becomes −h. Assume that the gaps of correctly
labelled pairs are normal with mean m and variance s². The gaps of flipped pairs are then normal with mean −m and
variance s². If a share ε of the pairs is flipped, the mixture has the mean M0 = (1 − 2ε)·m and the second moment
σ² + M0² = s² + m². The running statistics of β-DPO, M0 and σ, therefore give m and s. Bayes' rule gives the
probability p that a pair is flipped: log p/(1 − p) = log ε/(1 − ε) − 2·m·h/s².

Near β·h = 0 the gradient of the sigmoid loss is −½·β·∇h for a correct label and +½·β·∇h for a flipped one. Its
expectation is (1 − 2p) times the first. This factor, clamped to at least 0, is the weight of a pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from app.method.moments import Moments

SMALLEST_SPREAD = 0.1  # s² is at least this share of σ²: M0 and σ lag the gaps and may contradict each other


def flip_probability(discrepancy: Tensor, moments: Moments, flip_rate: float) -> Tensor:
    """Return p [G] float64, the probability that the label of each pair is flipped, for the discrepancies M [G].

    `flip_rate` is ε, the prior share of flipped pairs. p is ε for every pair while σ is unknown or below 1e-6, or
    while M0 is not positive: a policy that does not rank pairs correctly on average cannot tell which labels are
    wrong. p is NaN where M is NaN. Raises ValueError unless 0 ≤ ε < 0.5.
    """
    if not 0.0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate must lie in [0, 0.5), got {flip_rate}")
    discrepancy = discrepancy.detach().to(torch.float64)
    blind = moments.std is None or moments.std < 1e-6 or moments.mean <= 0.0
    if flip_rate == 0.0 or blind:
        return torch.full_like(discrepancy, flip_rate).masked_fill(torch.isnan(discrepancy), math.nan)
    assert moments.std is not None
    mean = moments.mean / (1.0 - 2.0 * flip_rate)
    variance = max(moments.std**2 + moments.mean**2 - mean**2, SMALLEST_SPREAD * moments.std**2)
    return torch.sigmoid(math.log(flip_rate / (1.0 - flip_rate)) - 2.0 * mean * discrepancy / variance)


def flip_weights(probability: Tensor, kept: Tensor) -> Tensor:
    """Return max(0, 1 − 2p) [G] for `probability` p [G], divided by its mean over the pairs `kept` [G] bool.

    The division makes the mean weight of the kept pairs 1. A NaN p counts as weight 0. All weights are 1 when
    no pair is kept or every kept pair has p ≥ ½.
    """
    weights = (1.0 - 2.0 * probability).clamp(min=0.0).nan_to_num(0.0)
    mean = weights[kept].mean() if bool(kept.any()) else weights.new_zeros(())
    return weights / mean if mean > 0 else torch.ones_like(weights)
