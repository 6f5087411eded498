"""The reward discrepancy M and its running mean and standard deviation: M, M0 and σ of the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from app.core.errors import UserError
from app.method.moments import MINIMUM_STD, RunningMoments
from app.method.ranges import ShareBelowOne, checked
from app.method.step import StepDecision
from callbacks.base import Decider, score_gap


@dataclass(eq=False)
class ExplicitRewardGap(Decider):
    """A callback that sets M = r(y_w; x) − r(y_l; x) instead of the policy's gap (paper §5, explicit reward model).

    Statistics, Gaussian filter and dynamic β then use this M. The logits of the loss stay β·h, and the filters by
    gradient scale still use h. Slot: `reward`.

    Args:
        chosen: column of the data that holds the reward of the chosen response.
        rejected: the same for the rejected response.
    """

    chosen: str = "chosen_reward"
    rejected: str = "rejected_reward"

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        if decision.moments is not None:
            raise UserError(
                "ExplicitRewardGap runs after the statistics, which hold the policy's own gap now: put it before "
                "RewardGapStatistics among the Trainer's callbacks."
            )
        decision.minimum_std = MINIMUM_STD  # rewards do not have the rounding error of h
        decision.discrepancy = score_gap(decision, self.chosen, self.rejected, self, "reward")
        pl_module.log("gap/explicit_mean", decision.discrepancy[decision.eligible].mean())


@checked
@dataclass(eq=False)
class RewardGapStatistics(Decider):
    """A callback that updates M0 and σ once per optimizer step, over all eligible pairs of the global batch.

    Slot: `statistics`, which runs before the slots that use M0 and σ.

    Args:
        momentum: m, the share of the past in the moving averages.
        gap_scale: `raw`: M is the gap itself, as in the released code and the published numbers; `beta0`: M is β0
            times the gap, as in the paper's text, where the same α acts β0 times as strongly.
        start: `bias_corrected`, as in Adam, or `zero`, as in the authors' code: M0 = σ = 0 before the first batch.
        ddof: 0 for the population standard deviation of a batch, 1 for that of the sample (the authors' code).
    """

    momentum: ShareBelowOne = 0.9
    gap_scale: Literal["raw", "beta0"] = "raw"
    start: Literal["bias_corrected", "zero"] = "bias_corrected"
    ddof: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        self.running = RunningMoments(momentum=self.momentum, start=self.start, ddof=self.ddof)

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        if self.gap_scale == "beta0":
            decision.discrepancy = decision.beta0 * decision.discrepancy
            decision.minimum_std = max(decision.beta0 * decision.minimum_std, MINIMUM_STD)
        moments = self.running.update(decision.discrepancy[decision.eligible])
        decision.moments = replace(moments, minimum_std=decision.minimum_std)
        mean, std = decision.moments.mean, decision.moments.std or 0.0
        pl_module.log("gap/running_mean", mean)
        pl_module.log("gap/running_std", std)
        # 1 if the gaps are too close to tell pairs apart; the Gaussian filter then draws all with equal probability
        pl_module.log("gap/too_close", float(decision.moments.spread is None))
        # one chart shows the batch mean against this band; all three are in the units of M
        pl_module.log("band/batch_mean", decision.discrepancy[decision.eligible].mean())
        pl_module.log("band/lower", mean - std)
        pl_module.log("band/upper", mean + std)

    def state_dict(self) -> dict[str, Any]:
        return self.running.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        try:
            self.running.load_state_dict(state_dict)
        except ValueError as error:
            raise UserError(f"RewardGapStatistics cannot continue this checkpoint: {error}.") from error
