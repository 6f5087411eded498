"""What every β schedule does with the β that it wants: clamp it, count how often, and say so."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from app.errors import UserError
from app.method.beta import BetaBounds
from app.method.losses import PairLoss
from app.method.step import StepDecision


class BoundedBeta(Callback):
    """Keeps β between `floor` and `ceiling`, both multiples of β0, and counts the steps that met one.

    Without a `floor` the loss decides: 0.01, or 0.25 where its target is 1/(2β) (`PairLoss.beta_floor`).
    """

    calmer = ""  # what the user can change when β meets its bounds: a clause without a full stop

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
