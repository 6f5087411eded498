"""Weights on the losses of a step's pairs, and RE-PO's probability that each label is right."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import compress
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from app.method import ranges, weights
from app.method.dynamic_beta import effective_sample_size
from app.method.pair_loss import PairLoss
from app.method.ranges import checked
from app.method.reference_flips import ReferenceFlips, fitted, label_weights
from app.method.step import StepDecision
from callbacks.base import Decider, Scored, label_column

log = logging.getLogger(__name__)
MOST_CURVES = 20  # annotators that are logged by name


class WeightedPairs(Decider):
    """A callback that multiplies the loss of every kept pair by a weight, without gradient."""

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        found = self.weights(pl_module, decision)
        if not found.any():
            who = type(self).__name__
            log.warning("step %d: %s gives every pair the weight 0: the step learns nothing", decision.step, who)
        decision.loss_weight[decision.kept] *= found
        pl_module.log("weights/mean", found.mean())
        pl_module.log("weights/largest", found.max())
        pl_module.log("weights/effective_sample_size", effective_sample_size(found.log()))

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
    temperature: ranges.PositiveFloat = 1.0

    def weights(self, pl_module: LightningModule, decision: StepDecision) -> Tensor:
        losses = decision.pair_losses()[decision.kept]
        if self.by == "dr_dpo":
            pl_module.log("weights/dr_dpo_loss", weights.dr_dpo_loss(losses, self.temperature))
            return weights.dr_dpo_weights(losses, self.temperature)
        found = weights.kldpo_weights(losses, self.temperature)
        pl_module.log("weights/clamped", (found >= weights.LARGEST_WEIGHT).double().mean())
        return found


@checked
@dataclass(eq=False)
class ScoreWeights(WeightedPairs, Scored):
    """Weights by the difference of two scores that the data carries, one for each response.

    `madpo` (arXiv 2510.05342): σ(c·r)/σ(r) with a factor c that falls with |r|, so that pairs with close scores
    count more. `quality`, the first weight of Omni-DPO (arXiv 2506.10054): σ(η·(S_w − S_l)), so that pairs with
    distant scores count more. Slot: `weights`.

    Args:
        by: `madpo` or `quality`.
        chosen: column of the data with the score of the chosen response; `data.reward_model` writes this one.
        rejected: the same for the rejected response.
        largest: c_max of MADPO.
        smallest: c_min of MADPO.
        threshold: τ of MADPO, the difference |r| at which the weight is 1.
        slope: λ of MADPO or η of Omni-DPO, per unit of the difference.
    """

    slot = "weights"
    by: Literal["madpo", "quality"] = "madpo"
    chosen: str = "chosen_reward"
    rejected: str = "rejected_reward"
    largest: ranges.FactorFromOne = 2.0
    smallest: ranges.ProperShare = 0.5
    threshold: ranges.NonNegativeFloat = 2.0
    slope: ranges.PositiveFloat = 1.0

    def weights(self, pl_module: LightningModule, decision: StepDecision) -> Tensor:
        gap = self.score_gap(decision.pair_ids, decision.labels)[decision.kept]
        if self.by == "quality":
            return weights.quality_weights(gap, self.slope)
        return weights.madpo_weights(gap, self.largest, self.smallest, self.slope, self.threshold)


@checked
@dataclass(eq=False)
class ReferenceWeights(Decider):
    """A callback that multiplies every pair's loss by max(0, 1 − 2p), p being the probability of a flipped label.

    p and the share of flipped labels are estimated from the reference's log-probabilities in recent steps
    (`app.method.reference_flips`). Needs a loss with a reference. Not in the paper: see docs/method.md.

    Args:
        window: number of steps whose margins the estimate uses.
    """

    window: ranges.PositiveInt = 16

    saved = ("margins", "flips")

    def __post_init__(self) -> None:
        self.margins: list[Tensor] = []  # of the last steps, [G] each
        self.flips: tuple[float, float] | None = None  # rate and slope of the newest `ReferenceFlips`

    def refusal(self, loss: PairLoss) -> str:
        return "" if loss.needs_reference else "has no reference: choose another model.loss or --weights null"

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        assert decision.reference_margin is not None
        self.margins = [*self.margins, decision.reference_margin[decision.eligible]][-self.window :]
        found = fitted(torch.cat(self.margins), ReferenceFlips(*self.flips) if self.flips else None)
        if found is None:  # no pair with a margin yet
            return
        self.flips = found.rate, found.slope
        probability = found.probability(decision.reference_margin)
        decision.loss_weight = decision.loss_weight * label_weights(probability, decision.kept)
        pl_module.log("filter/flip_rate", found.rate)
        pl_module.log("filter/reference_slope", found.slope)
        pl_module.log("filter/flipped_expected", probability[decision.kept].mean())
        pl_module.log("filter/weightless", (probability[decision.kept] >= 0.5).double().mean())


@checked
@dataclass(eq=False)
class AnnotatorReliability(Decider):
    """RE-PO (arXiv 2509.24159): the loss −[w·log p + (1 − w)·log(1 − p)], with w the probability of a right label.

    p = σ(L(swapped) − L(as labelled)) is the label's probability under `model.loss`, w = ηp/(ηp + (1 − η)(1 − p)),
    and η the reliability of the pair's annotator: after the step η ← (1 − a)·η + a·mean w over the annotator's
    eligible pairs. The loss must have a swapped form: sigmoid without label smoothing, IPO, SimPO, hinge. η is in
    the checkpoint, w in the audit as `label_confidence`. Slot: `confidence`.

    Args:
        column: column of the data that names the annotator; where the default is not in the data, all pairs have
            one annotator, which the log says. A pair without a value belongs to the annotator `unnamed`.
        initial: η of an annotator at its first pair.
        momentum: a, the share of the newest batch in η.
    """

    column: str = "annotator"
    initial: ranges.ProperShare = 0.9
    momentum: ranges.PositiveShare = 0.1

    saved = ("reliability",)

    def __post_init__(self) -> None:
        self.reliability: dict[str, float] = {}

    def refusal(self, loss: PairLoss) -> str:
        cure = "choose SigmoidLoss without label_smoothing, IPOLoss, SimPOLoss or HingeLoss, or --confidence null"
        lacks = "has no swapped form that is the loss of the opposite label"
        return "" if loss.has_swapped_form else f"{lacks}: {cure}"

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        annotators, good = self.annotators(decision), decision.eligible
        for name in annotators:
            self.reliability.setdefault(name, self.initial)
        reliability = torch.tensor([self.reliability[name] for name in annotators], dtype=torch.float64)
        decision.confidence = weights.label_confidence(decision.label_logits(), reliability)
        own, confidence = list(compress(annotators, good.tolist())), decision.confidence[good]
        self.reliability = weights.updated_reliability(self.reliability, own, confidence, self.momentum)
        pl_module.log("confidence/mean", confidence.mean())
        pl_module.log("confidence/doubted", (confidence < 0.5).double().mean())
        pl_module.log("confidence/lowest_reliability", min(self.reliability.values()))
        if 1 < len(self.reliability) <= MOST_CURVES:
            for name, value in self.reliability.items():
                pl_module.log(f"confidence/reliability_{name}", value)

    def annotators(self, decision: StepDecision) -> list[str]:
        """Return the annotator of every pair, [G]; raise UserError for a missing column other than the default."""
        if self.column == "annotator" and self.column not in decision.labels:
            if not self.reliability:
                carried = ", ".join(decision.labels) or "none"
                log.info("the data has no column 'annotator' (it has: %s): all pairs have one reliability", carried)
            return ["everyone"] * len(decision.pair_ids)
        names = label_column(decision.labels, self.column, self, "Name another by --confidence.column")
        if None in names and "unnamed" not in self.reliability:
            empty = f"{names.count(None)} of {len(names)} pairs of step {decision.step}"
            log.warning("%s have no value in the column %r: they share the annotator `unnamed`", empty, self.column)
        return ["unnamed" if name is None else str(name) for name in names]
