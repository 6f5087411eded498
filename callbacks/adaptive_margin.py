"""A margin per pair: the further its gap lies above the running mean, the more its logit must exceed."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from app.errors import UserError
from app.method.beta import adaptive_margin
from app.method.losses import PairLoss
from app.method.ranges import FiniteFloat, checked
from app.method.step import StepDecision


@checked
class AdaptiveMargin(Callback):
    """Subtracts γ + α·(M − M0)/σ from the logit β·h of every pair, without gradient.

    A variant of α-DPO (arXiv 2410.10148) with the running statistics of β-DPO, on any logit. α-DPO as published
    has no reference in its logit and multiplies the margin by β: `app.method.losses.AlphaDPOLoss`.
    For losses of that logit (sigmoid, cDPO, robust, hinge, SimPO); any other is refused at start-up. β is left
    as it is, so this goes together with any schedule. In the slot `margin`.

    Args:
        alpha: α, the margin per standard deviation of M; 0 gives every pair the margin γ.
        gamma: γ, the margin of a pair at M0. SimPO's loss has a γ of its own; this one comes on top.
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
