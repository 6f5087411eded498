"""The base class of the β schedules, which clamps β and reports how often it did."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from app.core.errors import UserError
from app.method.beta import BetaBounds
from app.method.pair_loss import PairLoss
from app.method.step import StepDecision


class BoundedBeta(Callback):
    """A schedule that keeps β between `floor` and `ceiling`, multiples of β0, and counts the clamped steps.

    The default of `floor` comes from the loss: 0.01, or 0.25 where its target is 1/(2β) (`PairLoss.beta_floor`).
    """

    calmer = ""  # advice to the user when β meets its bounds: a clause without a full stop

    def __init__(self, floor: float | None, ceiling: float | None):
        try:
            self.bounds = BetaBounds(BetaBounds.floor if floor is None else floor, ceiling)
        except ValueError as error:
            raise UserError(f"{type(self).__name__}: {error}.") from error
        self.floor = floor
        self.ceiling = ceiling
        self.clamped_steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        loss = getattr(pl_module, "loss", None)
        if self.floor is None and isinstance(loss, PairLoss):
            self.bounds = BetaBounds(loss.beta_floor, self.ceiling)

    def clamp(self, pl_module: LightningModule, decision: StepDecision, wanted: Tensor) -> Tensor:
        """Return `wanted` [G] within the bounds; log the bounds and the share of kept pairs that meet one."""
        beta = self.bounds.clamp(wanted, decision.beta0)
        clamped = int((beta != wanted)[decision.kept].sum())
        self.clamped_steps += clamped > 0
        pl_module.log("beta/clamped", clamped / max(decision.kept_count, 1))
        for name, bound in self.bounds.absolute(decision.beta0).items():
            pl_module.log(f"beta/{name}", bound)
        return beta

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.clamped_steps and trainer.is_global_zero:
            print(f"β met its bounds in {self.clamped_steps} of {trainer.global_step} steps: {self.calmer}.")

    def state_dict(self) -> dict[str, Any]:
        return {"clamped_steps": self.clamped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clamped_steps = state_dict["clamped_steps"]
