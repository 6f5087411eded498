"""RE-PO: the probability that each label is right, from the loss and the reliability of its annotator."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer

from app.core.errors import UserError
from app.method.ranges import PositiveShare, ProperShare, checked
from app.method.reliability import label_confidence, updated_reliability
from app.method.step import StepDecision
from callbacks.base import Decider, label_column, loss_of

log = logging.getLogger(__name__)
MOST_CURVES = 20  # annotators that are logged by name


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
    initial: ProperShare = 0.9
    momentum: PositiveShare = 0.1

    saved = ("reliability",)

    def __post_init__(self) -> None:
        self.reliability: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (loss := loss_of(pl_module)) and not loss.has_swapped_form:
            raise UserError(
                f"AnnotatorReliability: {loss} has no swapped form that is the loss of the opposite label: choose "
                "SigmoidLoss without label_smoothing, IPOLoss, SimPOLoss or HingeLoss, or --confidence null."
            )

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        annotators = self.annotators(decision)
        for name in annotators:
            self.reliability.setdefault(name, self.initial)
        reliability = torch.tensor([self.reliability[name] for name in annotators], dtype=torch.float64)
        decision.confidence = label_confidence(decision.label_logits(), reliability)
        good = decision.eligible
        self.reliability = updated_reliability(
            self.reliability,
            [name for name, one in zip(annotators, good.tolist(), strict=True) if one],
            decision.confidence[good],
            self.momentum,
        )
        pl_module.log("confidence/mean", decision.confidence[good].mean())
        pl_module.log("confidence/doubted", (decision.confidence[good] < 0.5).double().mean())
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
        names = label_column(decision, self.column, self, "Name another by --confidence.column")
        if None in names and "unnamed" not in self.reliability:
            empty = f"{names.count(None)} of {len(names)} pairs of step {decision.step}"
            log.warning("%s have no value in the column %r: they share the annotator `unnamed`", empty, self.column)
        return ["unnamed" if name is None else str(name) for name in names]
