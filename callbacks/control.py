"""Controls: the same arm with one of its decisions taken from the pairs that it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from app.core.errors import UserError, refused
from app.method.dynamic_beta import gumbel_top_k, selection_noise
from app.method.ranges import Seed, checked
from app.method.step import StepDecision
from callbacks.base import Decider
from callbacks.pair_audit import read_audit

Controlled = Literal[
    "random_filter", "shuffled_beta", "static_beta", "shuffled_margin", "shuffled_confidence", "shuffled_weights"
]
# the decision that each changes, and the slots of which one must be filled; it runs after the last of them
CONTROLS: dict[str, tuple[str, tuple[str, ...]]] = {
    "random_filter": ("kept", ("filter",)),
    "shuffled_beta": ("beta", ("schedule",)),
    "static_beta": ("beta", ("schedule",)),
    "shuffled_margin": ("margin", ("margin",)),
    "shuffled_confidence": ("confidence", ("confidence",)),
    "shuffled_weights": ("loss_weight", ("schedule", "weights")),
}
OWN_DRAW = 2**32  # added to the seed, so that a control does not draw what the filter draws


@checked
@dataclass(eq=False)
class Control(Decider):
    """A control of any arm: what remains of the arm's effect does not come from which pairs it treats how.

    `random_filter` keeps as many pairs as the filter, drawn with equal probability. `shuffled_…` exchanges values
    among the kept pairs of the step, so that their distribution stays. `static_beta` sets every β to the mean β of
    the pairs that a finished `run` of the arm trained on. Draws depend only on seed, step and position. Slot:
    `control`; it runs right after the slot that it controls.

    Args:
        by: the control.
        run: log folder of the finished run of the arm, for `static_beta`.
        seed: seed of the draw; none takes the run's `seed_everything`.
    """

    by: Controlled
    run: str | None = None
    seed: Seed | None = None

    saved = ("seed", "static_beta", "changed_steps")

    def __post_init__(self) -> None:
        if (self.by == "static_beta") != (self.run is not None):
            cure = "give run, the log folder of a finished run of the arm, with static_beta, and only then"
            raise UserError(f"Control: {cure}.")
        self.static_beta: float | None = None
        self.changed_steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.run is not None and self.static_beta is None:
            self.static_beta = mean_beta(Path(self.run))

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        assert self.seed is not None
        name = CONTROLS[self.by][0]
        value = getattr(decision, name)
        if value is None:
            return
        noise = selection_noise(self.seed + OWN_DRAW, decision.step - 1, len(decision.kept))
        if self.by == "random_filter":
            decision.log_weights = torch.zeros_like(decision.gaps).masked_fill(~decision.eligible, float("-inf"))
            changed = gumbel_top_k(decision.log_weights, decision.kept_count, noise)
        elif self.static_beta is not None:
            changed = torch.full_like(value, self.static_beta)
        else:
            changed = shuffled(value, decision.kept, noise)
        moved = ~torch.isclose(changed.double(), value.double(), atol=0.0)  # by more than a rounding of the mean
        share = float(moved[decision.eligible].double().mean())
        self.changed_steps += share > 0
        setattr(decision, name, changed)
        pl_module.log("control/changed", share)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.changed_steps and trainer.is_global_zero:
            print(f"The control {self.by} changed nothing: this arm decides alike for all pairs of a step.")


def shuffled(values: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
    """Return `values` [G] with those of the pairs `kept` [G] bool exchanged among them by `noise` [G]."""
    places = torch.nonzero(kept).flatten()
    result = values.clone()
    result[places] = values[places[noise[places].argsort()]]
    return result


def mean_beta(run: Path) -> float:
    """Return the mean β of the pairs that a run trained on, from its audit. Raises UserError if there is none."""
    with refused("control.run"):
        audit = read_audit(run)
    return float(audit.beta[audit.kept].mean())  # every step keeps a pair
