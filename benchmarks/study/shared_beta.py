"""β-DPO whose β is shared by fewer pairs than a step has, as where every micro-batch chooses its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.method.beta import BetaSchedule, batch_beta
from app.method.moments import Moments
from callbacks import BetaScheduler


@dataclass(frozen=True)
class SharedSchedule(BetaSchedule):
    """The schedule of the paper for `pairs` neighbours at a time; M0 is that of the step."""

    pairs: int = 64

    def beta(self, beta0: float, discrepancy: Tensor, kept: Tensor, moments: Moments | None) -> Tensor:
        """Return β of every pair, [G] float64, not clamped, for M [G] and the pairs `kept` [G] bool."""
        assert moments is not None
        groups = zip(discrepancy.split(self.pairs), kept.split(self.pairs), strict=True)
        return torch.cat(
            [batch_beta(beta0, self.alpha, group[chosen], moments).expand(len(group)) for group, chosen in groups]
        ).clone()


class SharedBeta(BetaScheduler):
    """`BetaScheduler` with one β for every `pairs` pairs."""

    def __init__(self, pairs: int, alpha: float = 0.6):
        super().__init__(alpha)
        self.schedule = SharedSchedule(alpha, pairs=pairs)
