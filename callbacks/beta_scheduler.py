"""Dynamic β: one value for the whole batch, or one for every pair, from the gap."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from app.errors import UserError
from app.method.beta import BetaBounds, BetaSchedule
from app.method.step import StepDecision


class BetaScheduler(Callback):
    """β = β0·(1 + α·(mean M of the kept pairs − M0)), clamped (paper eq. 6). No gradient flows through β.

    Put it after `PairFilter`, so that β comes from the pairs that are trained on, and after
    `RewardGapStatistics`, which only a constant M0 can do without.

    Args:
        alpha: α; 0 leaves β at β0.
        minimum: smallest β allowed; the share of kept pairs that hit a bound is logged as `beta/clamped`.
        maximum: largest β allowed; none for no ceiling.
        level: `batch`, one β from the mean M of the kept pairs, or `instance`, a β from every pair's own M.
        m0: a constant M0; none takes the running mean.
        z_normalised: measure M − M0 in running standard deviations, so that α does not hang on the scale of M.
        weight_matched: the control: β stays β0 and the loss is multiplied by β/β0 instead. What is left of an
            arm's effect under it comes from the size of the update, not from the shape of the loss.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        minimum: float = 1e-3,
        maximum: float | None = None,
        level: Literal["batch", "instance"] = "batch",
        m0: float | None = None,
        z_normalised: bool = False,
        weight_matched: bool = False,
    ):
        try:
            self.bounds = BetaBounds(minimum, maximum)
            self.schedule = BetaSchedule(alpha, level, m0, z_normalised)
        except ValueError as error:
            raise UserError(f"BetaScheduler: {error}.") from error
        self.weight_matched = weight_matched
        self.clamped_steps = 0

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        moments = decision.require_moments("BetaScheduler") if self.schedule.needs_moments else None
        wanted = self.schedule.beta(decision.beta0, decision.discrepancy, decision.kept, moments)
        wanted[~decision.eligible] = decision.beta0  # no loss is computed of these: any number will do
        beta = self.bounds.clamp(wanted)
        if self.weight_matched:
            decision.loss_weight = decision.loss_weight * (beta / decision.beta0)
            pl_module.log("beta/loss_weight", decision.loss_weight[decision.kept].mean())
        else:
            decision.beta = beta
        clamped = int((beta != wanted)[decision.kept].sum())
        self.clamped_steps += clamped > 0
        pl_module.log("beta/clamped", clamped / max(decision.kept_count, 1))
        for name, bound in self.bounds.named().items():
            pl_module.log(f"beta/{name}", bound)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.clamped_steps and trainer.is_global_zero:
            print(
                f"β met its bounds in {self.clamped_steps} of {trainer.global_step} steps: "
                "the gaps are wide for this α; lower BetaScheduler.alpha or β0."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"clamped_steps": self.clamped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clamped_steps = state_dict["clamped_steps"]
