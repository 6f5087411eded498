"""Pairs whose label looks flipped count less; nothing is drawn and nothing dropped."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from app.method.flips import flip_probability, flip_weights
from app.method.ranges import ShareBelowHalf, checked
from app.method.step import StepDecision


@checked
class FlipWeights(Callback):
    """Multiplies every pair's loss by max(0, 1 − 2p), p being the probability that its label is flipped.

    p follows from the pair's gap, M0 and σ (`app.method.flips`), so `RewardGapStatistics` must stand before it.
    Not in the paper: docs/flip-weights.md derives it, docs/study.md says what it is worth.

    Args:
        flip_rate: ε, the share of flipped labels to expect; 0 leaves every pair's weight at 1.
    """

    def __init__(self, flip_rate: ShareBelowHalf = 0.15):
        self.flip_rate = flip_rate

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        moments = decision.require_moments("FlipWeights")
        probability = flip_probability(decision.discrepancy, moments, self.flip_rate)
        decision.loss_weight = decision.loss_weight * flip_weights(probability, decision.kept)
        if decision.kept_count:
            pl_module.log("filter/flipped_expected", probability[decision.kept].mean())
            pl_module.log("filter/weightless", (probability[decision.kept] >= 0.5).double().mean())
