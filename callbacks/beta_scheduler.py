"""The β schedule of the paper: β follows the reward gap, per batch or per pair."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from app.core.errors import UserError
from app.method.beta import BetaSchedule
from app.method.ranges import FactorFromOne, FiniteFloat, PositiveShare, checked
from app.method.step import StepDecision
from callbacks.bounded_beta import BoundedBeta


@checked
class BetaScheduler(BoundedBeta):
    """The schedule β = β0·(1 + α·(mean M of the kept pairs − M0)), clamped (paper eq. 6), without gradient.

    Slot: `schedule`, which runs after the filter, so that β depends on the pairs that are trained on. Needs the
    slot `statistics`, except with a constant M0.

    Args:
        alpha: α; 0 leaves β at β0.
        floor: smallest β as a multiple of β0; none takes the loss's default: 0.01, or 0.25 for IPO and SPPO, whose
            target is 1/(2β). The share of kept pairs that meet a bound is logged as `beta/clamped`.
        ceiling: largest β as a multiple of β0; none for no ceiling.
        level: `batch`, one β from the mean M of the kept pairs, or `instance`, a β from every pair's own M.
        m0: a constant M0; none takes the running mean.
        z_normalised: measure M − M0 in running standard deviations, so that α does not depend on the scale of M.
        weight_matched: use this arm as a control: β stays β0 and the loss is multiplied by β/β0 instead. An
            effect that remains comes from the size of the update, not from the shape of the loss.
    """

    def __init__(
        self,
        alpha: FiniteFloat = 0.6,
        floor: PositiveShare | None = None,
        ceiling: FactorFromOne | None = None,
        level: Literal["batch", "instance"] = "batch",
        m0: FiniteFloat | None = None,
        z_normalised: bool = False,
        weight_matched: bool = False,
    ):
        super().__init__(floor, ceiling)
        try:
            self.schedule = BetaSchedule(alpha, level, m0, z_normalised)
        except ValueError as error:
            raise UserError(f"BetaScheduler: {error}.") from error
        self.weight_matched = weight_matched
        self.calmer = "lower schedule.alpha"
        if not z_normalised:
            self.calmer += ", or set schedule.z_normalised: true, which measures gaps in standard deviations"

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        moments = decision.require_moments("BetaScheduler") if self.schedule.needs_moments else None
        wanted = self.schedule.beta(decision.beta0, decision.discrepancy, decision.kept, moments)
        wanted[~decision.eligible] = decision.beta0  # these pairs have no loss, so any value will do
        beta = self.clamp(pl_module, decision, wanted)
        if self.weight_matched:
            decision.loss_weight = decision.loss_weight * (beta / decision.beta0)
            pl_module.log("beta/loss_weight", decision.loss_weight[decision.kept].mean())
        else:
            decision.beta = beta
