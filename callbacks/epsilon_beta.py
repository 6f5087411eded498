"""The β schedule of ε-DPO, which moves β by each pair's response to a perturbed β."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from app.core.errors import UserError
from app.method.epsilon import epsilon_beta, epsilon_steps, next_epsilon_beta
from app.method.pair_loss import PairLoss
from app.method.ranges import FactorFromOne, PositiveShare, ProperShare, checked
from app.method.step import StepDecision
from callbacks.bounded_beta import BoundedBeta


@checked
class EpsilonBeta(BoundedBeta):
    """The schedule β_i = β/(1 + ε·step_i), then β ← β/(1 + ε·mean step) for the next step (arXiv 2502.13177).

    step_i is +1 where the pair's log-probability gap grows as β is perturbed from β/(1−ε) to β/(1+ε), −1 where
    it falls, else 0. β starts at β0 and is saved in the checkpoint. Needs a reference and costs one more forward
    pass of policy and reference per step; needs no running statistics.

    Args:
        epsilon: ε, in (0, 1).
        floor: smallest β as a multiple of β0, also for the β of the next step; none takes the loss's default, as
            in `BetaScheduler`. The share of kept pairs that meet a bound is logged as `beta/clamped`.
        ceiling: largest β as a multiple of β0; none for no ceiling.
    """

    calmer = "lower schedule.epsilon or widen its bounds"

    def __init__(
        self,
        epsilon: ProperShare = 0.01,
        floor: PositiveShare | None = None,
        ceiling: FactorFromOne | None = None,
    ):
        super().__init__(floor, ceiling)
        self.epsilon = epsilon
        self.beta: float | None = None  # β of the next step; None before the first, which uses β0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        loss = getattr(pl_module, "loss", None)
        if isinstance(loss, PairLoss) and not loss.needs_reference:
            raise UserError(
                f"EpsilonBeta: {loss} has no reference whose logits perturb those of the policy: choose another "
                "model.loss or --schedule null."
            )
        if getattr(pl_module, "reference", "frozen") == "cached":
            raise UserError(
                "EpsilonBeta perturbs the reference's logits, and model.reference: cached keeps no model that has "
                "any: set it to frozen."
            )

    def on_reward_gaps(self, trainer: Trainer, pl_module: LightningModule, decision: StepDecision) -> None:
        assert decision.measure_perturbed is not None
        steps = epsilon_steps(*decision.measure_perturbed((-self.epsilon, 0.0, self.epsilon)))
        current = decision.beta0 if self.beta is None else self.beta
        wanted = epsilon_beta(current, self.epsilon, steps)
        decision.beta = self.clamp(pl_module, decision, wanted)
        following = wanted.new_tensor(next_epsilon_beta(current, self.epsilon, steps[decision.eligible]))
        self.beta = float(self.bounds.clamp(following, decision.beta0))
        pl_module.log("beta/mean_step", steps[decision.eligible].double().mean())

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.beta = state_dict["beta"]
        super().load_state_dict(state_dict)
