"""β-DPO whose β is shared by fewer pairs than a step has, as where every micro-batch chooses its own."""

from __future__ import annotations

import torch
from torch import Tensor

from app.method.dynamic_beta import Moments, batch_beta
from callbacks import BetaScheduler


class SharedBeta(BetaScheduler):
    """`BetaScheduler` with one β for every `pairs` neighbours; M0 is that of the step."""

    def __init__(self, pairs: int, alpha: float = 0.6):
        super().__init__(alpha)
        self.pairs = pairs

    def beta(self, beta0: float, discrepancy: Tensor, kept: Tensor, moments: Moments) -> Tensor:
        """Return β of every pair, [G] float64, not clamped, for M [G] and the pairs `kept` [G] bool."""
        groups = zip(discrepancy.split(self.pairs), kept.split(self.pairs), strict=True)
        return torch.cat(
            [batch_beta(beta0, self.alpha, group[chosen], moments).expand(len(group)) for group, chosen in groups]
        ).clone()
