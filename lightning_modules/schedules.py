"""Learning-rate schedules that torch has no class for, as classes because configurations use `class_path`."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from app.core.errors import UserError
from app.method.ranges import NonNegativeInt, PositiveInt, checked


@checked
class WarmupCosine(LambdaLR):
    """A linear warm-up to the optimizer's lr over `warmup_steps`, then half a cosine down to 0 at `total_steps`.

    SimPO's authors use this schedule (`lr_scheduler_type: cosine` of transformers). Raises UserError unless
    0 ≤ `warmup_steps` < `total_steps`.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: NonNegativeInt, total_steps: PositiveInt):
        if warmup_steps >= total_steps:
            raise UserError(f"WarmupCosine: warmup_steps {warmup_steps} must be below total_steps {total_steps}.")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            done = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
            return 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)
