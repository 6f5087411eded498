"""The β-guided filter, which selects the pairs of a batch that are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from app.method import selection
from app.method.ranges import PositiveShare, Seed, checked
from app.method.step import StepDecision
from callbacks.base import Decider, moments_for

Criterion = Literal["gaussian", "random", "head", "tail", "both"]


@checked
@dataclass(eq=False)
class PairFilter(Decider):
    """A filter that keeps the share ρ of the pairs, drawn without replacement ∝ exp(−(M − M0)²/2σ²) (paper §4.2).

    The draw depends only on (seed, step, position in the global batch), so it is the same on every rank, for any
    number of ranks and after a resume. Slot: `filter`; null keeps every pair.

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
        k = selection.number_kept(int(eligible.sum()), self.keep_ratio)
        noise = selection.selection_noise(self.seed, decision.step - 1, len(eligible))  # the draws count from 0
        if self.by in ("head", "tail", "both"):
            decision.kept = selection.keep_by_gradient_scale(decision.gaps, k, self.by, noise)
            return
        if self.by == "gaussian":
            log_weights = selection.gaussian_log_weights(decision.discrepancy, moments_for(self, decision))
        else:
            log_weights = torch.zeros_like(decision.gaps)
        decision.log_weights = log_weights.masked_fill(~eligible, float("-inf"))
        decision.kept = selection.gumbel_top_k(decision.log_weights, k, noise) & eligible
        if self.by == "gaussian":
            size = selection.effective_sample_size(decision.log_weights[eligible])
            pl_module.log("filter/effective_sample_size", size)
