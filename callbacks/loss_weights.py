"""Weights on the losses of a step's pairs, from the losses themselves or from scores that the data carries."""

from __future__ import annotations

import logging
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from app.method.ranges import FactorFromOne, NonNegativeFloat, PositiveFloat, ProperShare, checked
from app.method.selection import effective_sample_size
from app.method.step import StepDecision
from app.method.weights import (
    LARGEST_WEIGHT,
    dr_dpo_loss,
    dr_dpo_weights,
    kldpo_weights,
    madpo_weights,
    quality_weights,
)
from callbacks.explicit_reward_gap import rewards

log = logging.getLogger(__name__)


class WeightedPairs(Callback):
    """A callback that multiplies the loss of every kept pair by a weight, without gradient."""

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        if not decision.kept_count:
            return
        weights = self.weights(pl_module, decision)
        if not weights.any():
            log.warning(
                "step %d: %s gives every pair the weight 0: nothing is learned", decision.step, type(self).__name__
            )
        decision.loss_weight[decision.kept] *= weights
        pl_module.log("weights/mean", weights.mean())
        pl_module.log("weights/largest", weights.max())
        pl_module.log("weights/effective_sample_size", effective_sample_size(weights.log()))

    def weights(self, pl_module: LightningModule, decision: StepDecision) -> Tensor:
        """Return the weights of the kept pairs, [k] float64."""
        raise NotImplementedError


@checked
class LossWeights(WeightedPairs):
    """Weights by the pairs' own losses ℓ in the global batch: Dr. DPO or its opposite, KLDPO.

    `dr_dpo` (arXiv 2407.07880): n·softmax(−ℓ/β′), a large loss is taken for a wrong label. `kldpo` (arXiv
    2502.01930): min(10, exp((ℓ − mean ℓ)/τ)), a large loss is what to prepare for. ℓ is the loss under the β,
    margin and confidence of the step. Works with every loss. Slot: `weights`.

    Args:
        by: `dr_dpo` or `kldpo`.
        temperature: β′ or τ, in the units of the loss; the larger, the more equal the weights.
    """

    def __init__(self, by: Literal["dr_dpo", "kldpo"] = "dr_dpo", temperature: PositiveFloat = 1.0):
        self.by = by
        self.temperature = temperature

    def weights(self, pl_module: LightningModule, decision: StepDecision) -> Tensor:
        losses = decision.pair_losses()[decision.kept]
        if self.by == "dr_dpo":
            pl_module.log("weights/dr_dpo_loss", dr_dpo_loss(losses, self.temperature))
            return dr_dpo_weights(losses, self.temperature)
        weights = kldpo_weights(losses, self.temperature)
        pl_module.log("weights/clamped", (weights >= LARGEST_WEIGHT).double().mean())
        return weights


@checked
class ScoreWeights(WeightedPairs):
    """Weights by the difference of two scores that the data carries, one for each response.

    `madpo` (arXiv 2510.05342): σ(c·r)/σ(r) with a factor c that falls with |r|, so that pairs with close scores
    count more. `quality` (Omni-DPO, arXiv 2506.10054): σ(η·(S_w − S_l)), so that pairs with distant scores count
    more; the other weight of Omni-DPO has a gradient and its likelihood term a threshold of its own, so neither is
    here. Slot: `weights`.

    Args:
        by: `madpo` or `quality`.
        chosen: column of the data with the score of the chosen response; `data.reward_model` writes this one.
        rejected: the same for the rejected response.
        largest: c_max of MADPO.
        smallest: c_min of MADPO.
        threshold: τ of MADPO, the difference |r| at which the weight is 1.
        slope: λ of MADPO or η of Omni-DPO, per unit of the difference.
    """

    def __init__(
        self,
        by: Literal["madpo", "quality"] = "madpo",
        chosen: str = "chosen_reward",
        rejected: str = "rejected_reward",
        largest: FactorFromOne = 2.0,
        smallest: ProperShare = 0.5,
        threshold: NonNegativeFloat = 2.0,
        slope: PositiveFloat = 1.0,
    ):
        self.by = by
        self.chosen = chosen
        self.rejected = rejected
        self.largest = largest
        self.smallest = smallest
        self.threshold = threshold
        self.slope = slope

    def weights(self, pl_module: LightningModule, decision: StepDecision) -> Tensor:
        chosen, rejected = (rewards(decision, name, self, "weights") for name in (self.chosen, self.rejected))
        gap = (chosen - rejected)[decision.kept]
        if self.by == "quality":
            return quality_weights(gap, self.slope)
        return madpo_weights(gap, self.largest, self.smallest, self.slope, self.threshold)
