"""The callbacks of β-DPO: the running statistics of the reward gap, the filter of pairs, and the β schedules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from app.core.errors import UserError, refused
from app.method import dynamic_beta as method
from app.method.dynamic_beta import FLOOR, MINIMUM_STD, Moments, RunningMoments
from app.method.pair_loss import PairLoss
from app.method.ranges import FactorFromOne, FiniteFloat, PositiveShare, ProperShare, Seed, ShareBelowOne, checked
from app.method.step import StepDecision
from callbacks.base import Decider, Scored, loss_of, moments_for


@dataclass(eq=False)
class ExplicitRewardGap(Scored):
    """A callback that sets M = r(y_w; x) − r(y_l; x) instead of the policy's gap (paper §5, explicit reward model).

    Statistics, Gaussian filter and dynamic β then use this M. The logits of the loss stay β·h, and the filters by
    gradient scale still use h. Slot: `reward`.

    Args:
        chosen: column of the data that holds the reward of the chosen response.
        rejected: the same for the rejected response.
    """

    slot = "reward"
    chosen: str = "chosen_reward"
    rejected: str = "rejected_reward"

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        if decision.moments is not None:
            raise UserError("ExplicitRewardGap sets M too late: put it before RewardGapStatistics in the Trainer.")
        decision.minimum_std = MINIMUM_STD  # rewards do not have the rounding error of h
        decision.discrepancy = self.score_gap(decision.pair_ids, decision.labels)
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
        with refused("RewardGapStatistics cannot continue this checkpoint"):
            self.running.load_state_dict(state_dict)


Criterion = Literal["gaussian", "random", "head", "tail", "both"]


@checked
@dataclass(eq=False)
class PairFilter(Decider):
    """A filter that keeps the share ρ of the pairs, drawn without replacement ∝ exp(−(M − M0)²/2σ²) (paper §4.2).

    The draw depends only on seed, step and position in the global batch. Slot: `filter`; null keeps every pair.

    Args:
        keep_ratio: ρ, the share of pairs to keep.
        seed: seed of the draw; none takes the run's `seed_everything`.
        by: `gaussian` is the paper's criterion and needs the slot `statistics`; `random` draws all pairs with equal
            probability. The others drop by gradient scale σ(−β·h): `head` the largest scales, which are the
            smallest gaps, `tail` the smallest scales, `both` half from each end.
    """

    keep_ratio: PositiveShare = 0.8
    seed: Seed | None = None
    by: Criterion = "gaussian"

    saved = ("seed",)

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        assert self.seed is not None
        eligible = decision.eligible
        k = method.number_kept(int(eligible.sum()), self.keep_ratio)
        noise = method.selection_noise(self.seed, decision.step - 1, len(eligible))  # the draws count from 0
        if self.by in ("head", "tail", "both"):
            decision.kept = method.keep_by_gradient_scale(decision.gaps, k, self.by, noise)
            return
        if self.by == "gaussian":
            log_weights = method.gaussian_log_weights(decision.discrepancy, moments_for(self, decision))
        else:
            log_weights = torch.zeros_like(decision.gaps)
        decision.log_weights = log_weights.masked_fill(~eligible, float("-inf"))
        decision.kept = method.gumbel_top_k(decision.log_weights, k, noise) & eligible
        if self.by == "gaussian":
            size = method.effective_sample_size(decision.log_weights[eligible])
            pl_module.log("filter/effective_sample_size", size)


@checked
class BoundedBeta(Decider):
    """A schedule that keeps β between `floor` (by default that of the loss) and `ceiling`, multiples of β0."""

    saved: tuple[str, ...] = ("clamped_steps",)
    calmer = ""  # advice to the user when β meets its bounds: a clause without a full stop
    clamped_steps = 0
    default_floor = FLOOR

    def __init__(self, floor: PositiveShare | None = None, ceiling: FactorFromOne | None = None):
        self.floor = floor
        self.ceiling = ceiling

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if loss := loss_of(pl_module):
            self.default_floor = loss.beta_floor

    def bounds(self, beta0: float) -> tuple[float, float | None]:
        """Return the smallest and the largest β; None without a ceiling."""
        floor = self.default_floor if self.floor is None else self.floor
        return beta0 * floor, None if self.ceiling is None else beta0 * self.ceiling

    def clamp(self, pl_module: LightningModule, decision: StepDecision, wanted: Tensor) -> Tensor:
        """Return `wanted` [G] within the bounds; log the bounds and the share of kept pairs that meet one."""
        floor, ceiling = self.bounds(decision.beta0)
        beta = wanted.clamp(floor, ceiling)
        clamped = int((beta != wanted)[decision.kept].sum())
        self.clamped_steps += clamped > 0
        pl_module.log("beta/clamped", clamped / max(decision.kept_count, 1))
        pl_module.log("beta/floor", floor)
        if ceiling is not None:
            pl_module.log("beta/ceiling", ceiling)
        return beta

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.clamped_steps and trainer.is_global_zero:
            advice = f": {self.calmer}" if self.calmer else ""
            print(f"β met its bounds in {self.clamped_steps} of {trainer.global_step} steps{advice}.")


@checked
@dataclass(eq=False)
class BetaScheduler(BoundedBeta):
    """The schedule β = β0·(1 + α·(mean M of the kept pairs − M0)), clamped (paper eq. 6), without gradient.

    Slot: `schedule`, which runs after the filter, so that β depends on the pairs that are trained on. Needs the
    slot `statistics`, except with a constant M0.

    Args:
        alpha: α; 0 leaves β at β0.
        floor: smallest β as a multiple of β0; none takes the loss's default: 0.01, or 0.25 for IPO and SPPO, whose
            target is 1/(2β). The share of kept pairs that meet a bound is logged as `beta/clamped`.
        ceiling: largest β as a multiple of β0; none for no ceiling.
        level: `batch`, one β from the mean M of the kept pairs, or `instance`, a β from every pair's own M.
        m0: a constant M0; none takes the running mean.
        z_normalised: measure M − M0 in running standard deviations, so that α does not depend on the scale of M.
        weight_matched: a control: β stays β0 and the loss is multiplied by β/β0 instead. An effect that remains
            comes from the size of the update, not from the shape of the loss.
    """

    alpha: FiniteFloat = 0.6
    floor: PositiveShare | None = None
    ceiling: FactorFromOne | None = None
    level: Literal["batch", "instance"] = "batch"
    m0: FiniteFloat | None = None
    z_normalised: bool = False
    weight_matched: bool = False

    def __post_init__(self) -> None:
        self.calmer = "lower schedule.alpha"
        if not self.z_normalised:
            self.calmer += ", or set schedule.z_normalised: true, which measures gaps in standard deviations"

    def beta(self, beta0: float, discrepancy: Tensor, kept: Tensor, moments: Moments) -> Tensor:
        """Return β of every pair, [G] float64, not clamped, for M [G] and the pairs `kept` [G] bool."""
        if self.m0 is not None:
            moments = replace(moments, mean=self.m0)
        if self.z_normalised:
            discrepancy, moments = moments.z_scores(discrepancy), Moments(0.0, 1.0)
        if self.level == "instance":
            return method.instance_beta(beta0, self.alpha, discrepancy, moments)
        return method.batch_beta(beta0, self.alpha, discrepancy[kept], moments).expand(discrepancy.shape).clone()

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        needless = self.m0 is not None and not self.z_normalised
        moments = Moments(0.0, None) if needless else moments_for(self, decision)
        wanted = self.beta(decision.beta0, decision.discrepancy, decision.kept, moments)
        wanted[~decision.eligible] = decision.beta0  # these pairs have no loss, so any value will do
        beta = self.clamp(pl_module, decision, wanted)
        if self.weight_matched:
            decision.loss_weight = decision.loss_weight * (beta / decision.beta0)
            pl_module.log("beta/loss_weight", decision.loss_weight[decision.kept].mean())
        else:
            decision.beta = beta


@checked
@dataclass(eq=False)
class EpsilonBeta(BoundedBeta):
    """The schedule β_i = β/(1 + ε·step_i), then β ← β/(1 + ε·mean step) for the next step (arXiv 2502.13177).

    step_i is +1 where the pair's log-probability gap grows as β is perturbed from β/(1−ε) to β/(1+ε), −1 where
    it falls, else 0. β starts at β0 and is saved in the checkpoint. Needs a reference and costs one more forward
    pass of policy and reference per step; needs no running statistics.

    Args:
        epsilon: ε, in (0, 1).
        floor: smallest β as a multiple of β0, also in the next step; none takes the default of `BetaScheduler`.
        ceiling: largest β as a multiple of β0; none for no ceiling.
    """

    epsilon: ProperShare = 0.01
    floor: PositiveShare | None = None
    ceiling: FactorFromOne | None = None

    saved = ("beta", "clamped_steps")
    calmer = "lower schedule.epsilon or widen its bounds"

    def __post_init__(self) -> None:
        self.beta: float | None = None  # β of the next step; None before the first, which uses β0

    def refusal(self, loss: PairLoss) -> str:
        lacks = "has no reference whose logits perturb those of the policy"
        return "" if loss.needs_reference else f"{lacks}: choose another model.loss or --schedule null"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if getattr(pl_module, "reference", "frozen") == "cached":
            lacks = "model.reference: cached keeps no model"
            raise UserError(f"EpsilonBeta perturbs the reference's logits, and {lacks}: set it to frozen.")

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        assert decision.measure_perturbed is not None
        steps = method.epsilon_steps(*decision.measure_perturbed((-self.epsilon, 0.0, self.epsilon)))
        current = decision.beta0 if self.beta is None else self.beta
        wanted = method.epsilon_beta(current, self.epsilon, steps)
        decision.beta = self.clamp(pl_module, decision, wanted)
        following = wanted.new_tensor(method.next_epsilon_beta(current, self.epsilon, steps[decision.eligible]))
        self.beta = float(following.clamp(*self.bounds(decision.beta0)))
        pl_module.log("beta/mean_step", steps[decision.eligible].double().mean())
