"""A margin per pair that grows with the distance of the pair's gap above the running mean."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from app.errors import UserError
from app.method.beta import adaptive_margin
from app.method.losses import PairLoss
from app.method.ranges import FiniteFloat, checked
from app.method.step import StepDecision


@checked
class AdaptiveMargin(Callback):
    """A callback that subtracts γ + α·(M − M0)/σ from the logit β·h of every pair, without gradient.

    This is a variant of α-DPO (arXiv 2410.10148) that uses the running statistics of β-DPO and works on any logit.
    α-DPO as published has no reference in its logit and multiplies the margin by β; see
    `app.method.losses.AlphaDPOLoss`. The loss must have the logit β·h (sigmoid, cDPO, robust, hinge, SimPO);
    start-up refuses any other. β does not change, so any schedule may be used as well. Slot: `margin`.

    Args:
        alpha: α, the margin per standard deviation of M; 0 gives every pair the margin γ.
        gamma: γ, the margin of a pair at M0; it is added to the γ of SimPO's loss.
    """

    def __init__(self, alpha: FiniteFloat = 0.1, gamma: FiniteFloat = 0.0):
        self.alpha = alpha
        self.gamma = gamma

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        loss = getattr(pl_module, "loss", None)
        if isinstance(loss, PairLoss) and not loss.takes_margin:
            raise UserError(
                f"AdaptiveMargin: {loss} has no logit β·h to subtract a margin from: choose "
                "another model.loss (sigmoid, cDPO, robust, hinge or SimPO) or --margin null."
            )

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        moments = decision.require_moments("AdaptiveMargin")
        decision.margin = adaptive_margin(self.gamma, self.alpha, decision.discrepancy, moments)
        pl_module.log("margin/mean", decision.margin[decision.kept].mean())
