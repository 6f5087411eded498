"""Which pairs have a flipped label, by what the reference thinks of the two responses. Not in the paper.

The reference prefers one response of a pair by a margin: r is its log-probability per token of the chosen response
less that of the rejected one. Suppose that it prefers the better response with probability σ(κ·|r|), and that a
label is flipped with probability ε, whatever the pair. The odds that a pair with margin r is flipped are then
ε·σ(−κ·r) to (1 − ε)·σ(κ·r), and log p/(1 − p) = log ε/(1 − ε) − κ·r. Both numbers follow from the margins alone:
how often the larger ones are positive says ε, how fast that share rises from one half with |r| says κ. They are
fitted by maximum likelihood of the signs given |r|, the flips being the hidden variable of an EM algorithm.

The reference never moves, so that the policy's own mistakes cannot confirm themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_RATE = 0.45  # a label that is flipped as often as not says nothing, and 1 − 2p would be all noise
SMALLEST_RATE = 1e-3  # from 0, EM never gets away
STEEPEST = 100.0  # κ times the mean |r|: then every margin is all or nothing, and the likelihood may grow for ever
SILENT = 1e-9  # nats a token: a mean |r| below it is rounding


@dataclass(frozen=True)
class ReferenceFlips:
    """ε, the share of flipped labels, and κ, per nat a token, how much the reference's margin is worth."""

    rate: float
    slope: float

    def probability(self, margins: Tensor) -> Tensor:
        """p [G] float64, the probability that each label is flipped, for `margins` r [G]; NaN where r is."""
        prior = math.log(self.rate / (1.0 - self.rate))
        return torch.sigmoid(prior - self.slope * margins.detach().to(torch.float64))


def fitted(margins: Tensor, start: ReferenceFlips | None, rounds: int = 50) -> ReferenceFlips | None:
    """ε and κ by `rounds` of EM on `margins` [n], from `start`, or from ε = .15 and κ = 1/mean |r|.

    `start` when the margins are all but zero, which say nothing.
    """
    margins = margins.detach().to(torch.float64)
    size = float(margins.abs().mean()) if margins.numel() else 0.0
    if size < SILENT:
        return start
    scaled = margins / size
    rate, slope = (0.15, 1.0) if start is None else (start.rate, min(start.slope * size, STEEPEST))
    for _ in range(rounds):
        right = 1.0 - ReferenceFlips(rate, slope).probability(scaled)
        rate = min(max(float(1.0 - right.mean()), SMALLEST_RATE), LARGEST_RATE)
        # one Newton step of the logistic regression of the right labels on the margins, at most a doubling
        agreed = torch.sigmoid(slope * scaled)
        curvature = float((scaled.square() * agreed * (1.0 - agreed)).sum())
        step = float((scaled * (right - agreed)).sum()) / curvature if curvature > 0 else 0.0
        slope = min(max(slope + step, 0.0), 2.0 * slope + 1.0, STEEPEST)
    return ReferenceFlips(rate, slope / size)
