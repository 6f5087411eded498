"""Weights on the losses of a step's pairs, from the losses, from scores of the data, or from the reference."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from app.core.errors import UserError
from app.method.ranges import FactorFromOne, NonNegativeFloat, PositiveFloat, PositiveInt, ProperShare, checked
from app.method.reference_flips import ReferenceFlips, fitted, label_weights
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
from callbacks.base import Decider, score_gap

log = logging.getLogger(__name__)


class WeightedPairs(Decider):
    """A callback that multiplies the loss of every kept pair by a weight, without gradient."""

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        if not decision.kept_count:
            return
        weights = self.weights(pl_module, decision)
        if not weights.any():
            log.warning(
                "step %d: %s gives every pair the weight 0: the step learns nothing",
                decision.step,
                type(self).__name__,
            )
        decision.loss_weight[decision.kept] *= weights
        pl_module.log("weights/mean", weights.mean())
        pl_module.log("weights/largest", weights.max())
        pl_module.log("weights/effective_sample_size", effective_sample_size(weights.log()))

    def weights(self, pl_module: LightningModule, decision: StepDecision) -> Tensor:
        """Return the weights of the kept pairs, [k] float64."""
        raise NotImplementedError


@checked
@dataclass(eq=False)
class LossWeights(WeightedPairs):
    """Weights by the pairs' own losses ℓ in the global batch: Dr. DPO or its opposite, KLDPO.

    `dr_dpo` (arXiv 2407.07880): n·softmax(−ℓ/β′), a large loss is taken for a wrong label. `kldpo` (arXiv
    2502.01930): min(10, exp((ℓ − mean ℓ)/τ)), a large loss is what to prepare for. ℓ is the loss under the β,
    margin and confidence of the step. Works with every loss. Slot: `weights`.

    Args:
        by: `dr_dpo` or `kldpo`.
        temperature: β′ or τ, in the units of the loss; the larger, the more equal the weights.
    """

    by: Literal["dr_dpo", "kldpo"] = "dr_dpo"
    temperature: PositiveFloat = 1.0

    def weights(self, pl_module: LightningModule, decision: StepDecision) -> Tensor:
        losses = decision.pair_losses()[decision.kept]
        if self.by == "dr_dpo":
            pl_module.log("weights/dr_dpo_loss", dr_dpo_loss(losses, self.temperature))
            return dr_dpo_weights(losses, self.temperature)
        weights = kldpo_weights(losses, self.temperature)
        pl_module.log("weights/clamped", (weights >= LARGEST_WEIGHT).double().mean())
        return weights


@checked
@dataclass(eq=False)
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

    by: Literal["madpo", "quality"] = "madpo"
    chosen: str = "chosen_reward"
    rejected: str = "rejected_reward"
    largest: FactorFromOne = 2.0
    smallest: ProperShare = 0.5
    threshold: NonNegativeFloat = 2.0
    slope: PositiveFloat = 1.0

    def weights(self, pl_module: LightningModule, decision: StepDecision) -> Tensor:
        gap = score_gap(decision, self.chosen, self.rejected, self, "weights")[decision.kept]
        if self.by == "quality":
            return quality_weights(gap, self.slope)
        return madpo_weights(gap, self.largest, self.smallest, self.slope, self.threshold)


@checked
@dataclass(eq=False)
class ReferenceWeights(Decider):
    """A callback that multiplies every pair's loss by max(0, 1 − 2p), p being the probability of a flipped label.

    p is computed from the reference's log-probabilities of the two responses. The share of flipped labels is
    estimated from those of recent steps (`app.method.reference_flips`). Needs a loss with a reference. This is not
    in the paper: docs/method.md derives it, docs/study.md reports its effect.

    Args:
        window: number of steps whose margins the estimate uses.
    """

    window: PositiveInt = 16

    def __post_init__(self) -> None:
        self._margins: list[Tensor] = []  # of the last steps, [G] each
        self._flips: ReferenceFlips | None = None

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        if decision.reference_margin is None:
            raise UserError("ReferenceWeights needs a reference: choose a loss that has one, or --weights null.")
        self._margins = [*self._margins, decision.reference_margin[decision.eligible]][-self.window :]
        self._flips = fitted(torch.cat(self._margins), self._flips)
        if self._flips is None:  # no pair with a margin yet
            return
        probability = self._flips.probability(decision.reference_margin)
        decision.loss_weight = decision.loss_weight * label_weights(probability, decision.kept)
        pl_module.log("filter/flip_rate", self._flips.rate)
        pl_module.log("filter/reference_slope", self._flips.slope)
        if decision.kept_count:
            pl_module.log("filter/flipped_expected", probability[decision.kept].mean())
            pl_module.log("filter/weightless", (probability[decision.kept] >= 0.5).double().mean())

    def state_dict(self) -> dict[str, Any]:
        flips = self._flips
        return {"margins": self._margins, "flips": None if flips is None else (flips.rate, flips.slope)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._margins = state_dict["margins"]
        self._flips = None if state_dict["flips"] is None else ReferenceFlips(*state_dict["flips"])
