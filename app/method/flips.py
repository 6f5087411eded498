"""Which pairs have a flipped label, by the gaps alone, and how much less they should count. Not in the paper.

A flipped label swaps the two responses of a pair: its gap h becomes −h. Where the gaps of rightly labelled pairs
are normal with mean m and variance s², those of flipped pairs are normal with mean −m and variance s²; with a
share ε of flipped pairs the mixture has the mean M0 = (1 − 2ε)·m and the second moment σ² + M0² = s² + m². So the
running statistics of β-DPO, M0 and σ, give m and s, and Bayes' rule gives every pair's probability p of being
flipped: log p/(1 − p) = log ε/(1 − ε) − 2·m·h/s².

The gradient of the sigmoid loss, near β·h = 0, is −½·β·∇h for a right label and +½·β·∇h for a flipped one; its
expectation is (1 − 2p) times the first. That factor, at least 0, is the weight of a pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from app.method.moments import Moments

SMALLEST_SPREAD = 0.1  # of σ² that s² is never taken below: M0 and σ lag the gaps and may not fit together


def flip_probability(discrepancy: Tensor, moments: Moments, flip_rate: float) -> Tensor:
    """p [G] float64, the probability that the label of a pair is flipped, for the discrepancies M [G].

    `flip_rate` is ε, the share of flipped pairs expected beforehand. p is ε for every pair while σ is unknown or
    tiny, and while M0 is not positive: a policy that does not rank its pairs right on average cannot tell which
    are wrong. NaN where M is. Raises ValueError unless 0 ≤ ε < 0.5.
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
    """max(0, 1 − 2p) [G] for `probability` p [G], divided by its mean over the pairs `kept` [G] bool.

    Divided, so that the weight of a step stays that of its pairs. All ones when every kept pair has p ≥ ½.
    """
    weights = (1.0 - 2.0 * probability).clamp(min=0.0).nan_to_num(0.0)
    mean = weights[kept].mean() if bool(kept.any()) else weights.new_zeros(())
    return weights / mean if mean > 0 else torch.ones_like(weights)
