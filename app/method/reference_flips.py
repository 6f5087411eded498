"""Estimate from the reference's margins which labels are flipped: not in the paper, derived in docs/method.md.

The margin r of a pair is the reference's log-probability per token of the chosen response minus that of the
rejected one. The model: the reference prefers the better response with probability σ(κ·|r|), and every label is
flipped with the same probability ε. EM fits κ and ε by maximum likelihood of the signs given |r|, with the flips as
hidden variable. Then a pair is flipped with the probability p of log p/(1 − p) = log ε/(1 − ε) − κ·r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_RATE = 0.45  # a label that is flipped half of the time has no information, and 1 − 2p would be noise
SMALLEST_RATE = 1e-3  # EM cannot leave a rate of 0
STEEPEST = 100.0  # κ times the mean |r|; without a bound the likelihood may grow with κ indefinitely
SILENT = 1e-9  # nats per token: a mean |r| below this is rounding


@dataclass(frozen=True)
class ReferenceFlips:
    """The fitted model: `rate` is ε, the share of flipped labels; `slope` is κ, per (nat per token) of margin."""

    rate: float
    slope: float

    def probability(self, margins: Tensor) -> Tensor:
        """Return p [G] float64, the probability that each label is flipped, for `margins` r [G]; NaN where r is."""
        prior = math.log(self.rate / (1.0 - self.rate))
        return torch.sigmoid(prior - self.slope * margins.detach().to(torch.float64))


def fitted(margins: Tensor, start: ReferenceFlips | None, rounds: int = 50) -> ReferenceFlips | None:
    """Fit ε and κ by EM to `margins` [n], from `start` or ε = .15, κ = 1/mean |r|; if they are SILENT, `start`."""
    margins = margins.detach().to(torch.float64)
    size = float(margins.abs().mean()) if margins.numel() else 0.0
    if size < SILENT:
        return start
    scaled = margins / size
    rate, slope = (0.15, 1.0) if start is None else (start.rate, min(start.slope * size, STEEPEST))
    for _ in range(rounds):
        right = 1.0 - ReferenceFlips(rate, slope).probability(scaled)
        rate = min(max(float(1.0 - right.mean()), SMALLEST_RATE), LARGEST_RATE)
        # one Newton step of the logistic regression of correct labels on margins; the bound keeps it from diverging
        agreed = torch.sigmoid(slope * scaled)
        curvature = float((scaled.square() * agreed * (1.0 - agreed)).sum())
        step = float((scaled * (right - agreed)).sum()) / curvature if curvature > 0 else 0.0
        slope = min(max(slope + step, 0.0), 2.0 * slope + 1.0, STEEPEST)
    return ReferenceFlips(rate, slope / size)


def label_weights(probability: Tensor, kept: Tensor) -> Tensor:
    """Return max(0, 1 − 2p) [G] over its mean in the pairs `kept` [G] bool; all ones if every kept p is ≥ ½."""
    weights = (1.0 - 2.0 * probability).clamp(min=0.0).nan_to_num(0.0)
    mean = weights[kept].mean() if bool(kept.any()) else weights.new_zeros(())
    # divided, so that the weight of a step stays that of its pairs
    return weights / mean if mean > 0 else torch.ones_like(weights)
