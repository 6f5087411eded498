"""Loss weights that count a pair less if the reference doubts its label; no pair is dropped."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from app.core.errors import UserError
from app.method.ranges import PositiveInt, checked
from app.method.reference_flips import ReferenceFlips, fitted, label_weights
from app.method.step import StepDecision


@checked
class ReferenceWeights(Callback):
    """A callback that multiplies every pair's loss by max(0, 1 − 2p), p being the probability of a flipped label.

    p is computed from the reference's log-probabilities of the two responses. The share of flipped labels is
    estimated from those of recent steps (`app.method.reference_flips`). Needs a loss with a reference. This is not
    in the paper: docs/method.md derives it, docs/study.md reports its effect.

    Args:
        window: number of steps whose margins the estimate uses.
    """

    def __init__(self, window: PositiveInt = 16):
        self.window = window
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
