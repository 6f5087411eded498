"""Margins per pair, subtracted from the logit β·h, by the gaps of the batch or of recent batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from app.core.errors import UserError
from app.method.margins import amapo_margins, gamma_po_margins, standardised_margin
from app.method.pair_loss import PairLoss
from app.method.ranges import FiniteFloat, PositiveFloat, PositiveInt, checked
from app.method.step import StepDecision
from callbacks.base import Decider, moments_for


class PairMargin(Decider):
    """A callback that sets a margin per pair, without gradient, for a loss with the logit β·h."""

    def refusal(self, loss: PairLoss) -> str:
        cure = "choose another model.loss (sigmoid, cDPO, robust, hinge or SimPO) or --margin null"
        return "" if loss.takes_margin else f"has no logit β·h to subtract a margin from: {cure}"

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        decision.margin = self.margins(decision)
        kept = decision.margin[decision.kept]
        pl_module.log("margin/mean", kept.mean())
        pl_module.log("margin/std", kept.std(correction=0))

    def margins(self, decision: StepDecision) -> Tensor:
        """Return the margin of every pair, [G] float64."""
        raise NotImplementedError


@checked
@dataclass(eq=False)
class StandardisedMargin(PairMargin):
    """A margin γ + α·(M − M0)/σ: it grows with the distance of a pair's gap above the running mean.

    For losses with the logit β·h (sigmoid, cDPO, robust, hinge, SimPO). It is not α-DPO (`AlphaDPOLoss`), whose
    logit has no reference and whose margin is multiplied by β. Slot: `margin`, with the slot `statistics`.

    Args:
        alpha: α, the margin per standard deviation of M; 0 gives every pair the margin γ.
        gamma: γ, the margin of a pair at M0; it is added to the γ of SimPO's loss.
    """

    alpha: FiniteFloat = 0.1
    gamma: FiniteFloat = 0.0

    def margins(self, decision: StepDecision) -> Tensor:
        return standardised_margin(self.gamma, self.alpha, decision.discrepancy, moments_for(self, decision))


@checked
@dataclass(eq=False)
class GammaPOMargin(PairMargin):
    """The dynamic target margin of γ-PO (arXiv 2506.03690): larger for pairs that the policy ranks confidently.

    The margins have the mean γ0 over a queue of the last gaps, each times the β of its step, and solve the equation
    that the authors' mirror descent approaches (`app.method.margins.gamma_po_margins`). The queue is in the
    checkpoint. With SimPO set its own `gamma` to 0. Slot: `margin`; needs no statistics.

    Args:
        gamma: γ0, the mean margin, in the units of the logit.
        temperature: τ; the smaller, the more the margins differ.
        window: number of gaps in the queue, those of the current batch included; a larger batch is not cut.
    """

    gamma: PositiveFloat = 0.4
    temperature: PositiveFloat = 10.0
    window: PositiveInt = 2048

    saved = ("queue",)

    def __post_init__(self) -> None:
        if self.gamma / self.temperature > 1000:
            raise UserError("GammaPOMargin: gamma / temperature must be at most 1000, or the margins overflow.")
        self.queue = torch.zeros(0, dtype=torch.float64)

    def margins(self, decision: StepDecision) -> Tensor:
        good = decision.eligible
        own = (decision.beta * decision.gaps)[good]
        # the queue ends with the batch, so that its margins are the last ones
        self.queue = torch.cat([self.queue, own])[-max(self.window, own.numel()) :]
        margins = torch.full_like(decision.gaps, self.gamma)
        margins[good] = gamma_po_margins(self.queue, self.gamma, self.temperature)[-own.numel() :]
        return margins


class AMaPOMargin(PairMargin):
    """AMaPO's margin (arXiv 2511.09385): β·exp(μ·(μ − h̄)/s) for gaps h̄ below the batch's mean μ, else 0.

    h̄ is SimPO's gap, length-normalised and without reference, so that model.loss must be SimPOLoss; set its `gamma`
    to 0 for AMaPO as published, and β0 to 2 or 3. Slot: `margin`; needs no statistics.
    """

    def refusal(self, loss: PairLoss) -> str:
        if loss.takes_margin and not loss.needs_reference:
            return ""
        return "has no length-normalised gap without reference: choose model.loss SimPOLoss or --margin null"

    def margins(self, decision: StepDecision) -> Tensor:
        good = decision.eligible
        margins = torch.zeros_like(decision.gaps)
        margins[good] = amapo_margins(decision.gaps[good], decision.beta[good])
        return margins
