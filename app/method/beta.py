"""β schedules, computed from the reward discrepancy (β-DPO, arXiv 2407.08639, section 4).

Every schedule is β0·(1 + α·(M − M0)), then clamped. Schedules differ in the M, the M0 and the unit that they use.
Every function here detaches its inputs, so that no gradient flows through β.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from app.method.moments import Moments
from app.method.ranges import FactorFromOne, FiniteFloat, PositiveShare, checked


@checked
@dataclass(frozen=True)
class BetaBounds:
    """The interval that β is clamped to, in multiples of β0; without an upper bound when `ceiling` is None.

    The default floor is the paper's 1e-3 at its β0 = 0.1. Raw gaps do reach it: with α = 0.6, the mean of 51 gaps
    with standard deviation 10 takes β to the floor in one batch out of eight. A negative β would train towards the
    rejected response. The caller counts how often β is clamped.
    Raises ValueError unless 0 < floor ≤ 1 ≤ ceiling, all finite, so that β0 lies within its bounds.
    """

    floor: PositiveShare = 0.01
    ceiling: FactorFromOne | None = None

    def absolute(self, beta0: float) -> dict[str, float]:
        """Return the bounds in the units of β: `floor` and, if there is one, `ceiling`."""
        bounds = {"floor": self.floor, "ceiling": self.ceiling}
        return {name: beta0 * bound for name, bound in bounds.items() if bound is not None}

    def clamp(self, beta: Tensor, beta0: float) -> Tensor:
        """Return `beta` (any shape) clamped to the interval."""
        return beta.clamp(min=beta0 * self.floor, max=None if self.ceiling is None else beta0 * self.ceiling)


def batch_beta(beta0: float, alpha: float, kept_discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return one β for the step, β0·(1 + α·(mean_{i∈K} M_i − M0)): 0-d float64, not clamped.

    `kept_discrepancy` [k] holds M of the pairs that the filter keeps. β is β0 when no pair is kept, and bitwise
    equal to β0 for α = 0.
    """
    kept = kept_discrepancy.detach().to(torch.float64)
    deviation = kept.mean() - moments.mean if kept.numel() else kept.new_zeros(())
    return beta0 * (1.0 + alpha * deviation)


def instance_beta(beta0: float, alpha: float, discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return a β for every pair, β0·(1 + α·(M_i − M0)): [G] float64, not clamped.

    This is the paper's instance-level variant. A NaN discrepancy gives a NaN β for that pair only.
    """
    return beta0 * (1.0 + alpha * (discrepancy.detach().to(torch.float64) - moments.mean))


@checked
@dataclass(frozen=True)
class BetaSchedule:
    """A β schedule of the paper or an ablation of it: α, and independent choices of the level, M0 and the unit.

    alpha: α, how strongly β follows M; 0 leaves β at β0.
    level: "batch", one β from the mean M of the kept pairs (the method); "instance", a β for every pair.
    m0: a constant M0; None uses the running mean.
    z_normalised: measure M − M0 in running standard deviations, so that α does not depend on the scale of M;
        β stays β0 while σ is unknown or too small (`Moments.spread`).

    Raises ValueError for an α or M0 that is not finite, or for another level.
    """

    alpha: FiniteFloat = 0.6
    level: Literal["batch", "instance"] = "batch"
    m0: FiniteFloat | None = None
    z_normalised: bool = False

    @property
    def needs_moments(self) -> bool:
        """Return whether the schedule reads the running statistics; with a constant M0 and raw gaps it does not."""
        return self.m0 is None or self.z_normalised

    def beta(self, beta0: float, discrepancy: Tensor, kept: Tensor, moments: Moments | None) -> Tensor:
        """Return β of every pair, [G] float64, not clamped, for M [G] and the pairs `kept` [G] bool.

        At batch level β is equal for all pairs. At instance level a NaN in M gives a NaN β for that pair only.
        Raises ValueError if `moments` is None although `needs_moments` is True.
        """
        if moments is None:
            if self.needs_moments:
                raise ValueError("this β schedule needs the running moments")
            moments = Moments(0.0, None)
        centre = moments if self.m0 is None else replace(moments, mean=self.m0)
        if self.z_normalised:
            discrepancy, centre = centre.z_scores(discrepancy), Moments(0.0, 1.0)
        if self.level == "instance":
            return instance_beta(beta0, self.alpha, discrepancy, centre)
        beta = batch_beta(beta0, self.alpha, discrepancy[kept], centre)
        return beta.expand(discrepancy.shape).clone()
