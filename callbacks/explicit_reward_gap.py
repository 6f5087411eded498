"""The reward discrepancy M from the scores of an external reward model, which the data has in two columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from app.core.errors import UserError
from app.method.moments import MINIMUM_STD
from app.method.step import StepDecision


class ExplicitRewardGap(Callback):
    """A callback that sets M = r(y_w; x) − r(y_l; x) instead of the policy's gap (paper §5, explicit reward model).

    Statistics, Gaussian filter and dynamic β then use this M. The logits of the loss stay β·h, and the filters by
    gradient scale still use h. Slot: `reward`.

    Args:
        chosen: column of the data that holds the reward of the chosen response.
        rejected: the same for the rejected response.
    """

    def __init__(self, chosen: str = "chosen_reward", rejected: str = "rejected_reward"):
        self.chosen = chosen
        self.rejected = rejected

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        if decision.moments is not None:
            raise UserError(
                "ExplicitRewardGap comes too late, the statistics have taken in the policy's own gap: put it "
                "before RewardGapStatistics among the Trainer's callbacks."
            )
        decision.minimum_std = MINIMUM_STD  # rewards do not have the rounding error of h
        chosen, rejected = (rewards(decision, name, self, "reward") for name in (self.chosen, self.rejected))
        decision.discrepancy = chosen - rejected
        pl_module.log("gap/explicit_mean", decision.discrepancy[decision.eligible].mean())


def rewards(decision: StepDecision, column: str, asker: Callback, slot: str) -> Tensor:
    """Return the label column `column`, [G] float64, to the callback `asker` of a `slot`.

    Raises UserError if it is missing or not all finite numbers.
    """
    who = type(asker).__name__
    if column not in decision.labels:
        carried = ", ".join(decision.labels) or "none"
        raise UserError(
            f"{who}: the data has no column {column!r}; it carries these: {carried}. Add it to the "
            f"data, or name another by --{slot}.chosen and --{slot}.rejected."
        )
    values: Sequence[object] = decision.labels[column]
    numbers = []
    for pair_id, value in zip(decision.pair_ids, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(
                f"{who}: column {column!r} of pair {pair_id} holds {value!r} where a finite number "
                "is needed: correct the data or leave that pair out."
            )
        numbers.append(float(value))
    return torch.tensor(numbers, dtype=torch.float64)
