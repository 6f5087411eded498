"""Running mean M0 and standard deviation σ of the reward discrepancy (β-DPO, arXiv 2407.08639, section 4)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from app.method.ranges import ShareBelowOne, checked

MINIMUM_STD = 1e-6  # below this σ of M, all pairs count as equal


def rounding_std(compute_dtype: torch.dtype) -> float:
    """Return the σ of h, in nats, that rounding in a forward pass in `compute_dtype` can explain.

    In bfloat16, the gaps from two equivalent kernels differed with a σ of .06 over a batch, and the first steps of
    real runs had a σ of .1 or more. The bound lies between the two.
    """
    return 0.08 if compute_dtype == torch.bfloat16 else MINIMUM_STD


@dataclass(frozen=True)
class Moments:
    """The M0 and σ that one step uses, in the units of the discrepancy M.

    `std` is None until the first batch with at least two pairs, because one pair has no spread. A σ below
    `minimum_std` is treated as rounding.
    """

    mean: float
    std: float | None
    minimum_std: float = MINIMUM_STD

    @property
    def spread(self) -> float | None:
        """Return σ, or None if it is unknown or too small to tell pairs apart."""
        return None if self.std is None or self.std < self.minimum_std else self.std

    def z_scores(self, discrepancy: Tensor) -> Tensor:
        """Return (M_i − M0)/σ, float64 and detached, in the shape of `discrepancy`; NaN where M_i is NaN.

        Without a `spread` all scores are zero. This is normal at the first step: the policy equals the reference,
        so every gap is 0 and σ is 0.
        """
        discrepancy = discrepancy.detach().to(torch.float64)
        if self.spread is None:
            return torch.zeros_like(discrepancy).masked_fill(torch.isnan(discrepancy), math.nan)
        return (discrepancy - self.mean) / self.spread


@checked
@dataclass
class RunningMoments:
    """The exponential moving averages of the batch mean and of the batch standard deviation.

    M0 ← m·M0 + (1−m)·mean(M) and σ ← m·σ + (1−m)·std(M), updated *before* the step uses them. As in the paper, σ
    averages the standard deviations; it is not the root of an averaged variance.

    The averages lag. A batch mean that grows by d per step stays d·m/(1−m) above M0 (9·d for m = 0.9), so a
    steadily growing gap alone raises a batch-level β.

    `start`: "bias_corrected" divides by 1 − m^t as Adam does; "zero" uses the averages as they grow from zero, like
    the authors' released code (with m = 0.9, σ is ten times too small at the first step). `ddof` 1 is Bessel's
    correction, as in that code. `mean`, `std`, `mean_updates` and `std_updates` are the raw state: Python numbers,
    so that every checkpoint format stores them exactly.
    """

    momentum: ShareBelowOne = 0.9
    start: Literal["bias_corrected", "zero"] = "bias_corrected"
    ddof: Literal[0, 1] = 0
    mean: float = 0.0
    std: float = 0.0
    mean_updates: int = 0
    std_updates: int = 0

    def update(self, values: Tensor) -> Moments:
        """Add the discrepancies `values` [n] of a global batch and return the moments to use for that batch.

        Without values nothing changes; one value changes M0 and not σ. Raises ValueError for a value that is not
        finite, because a NaN would never leave the averages.
        """
        values = values.detach().to("cpu", torch.float64).reshape(-1)
        if not bool(torch.isfinite(values).all()):
            raise ValueError("running moments need finite discrepancies: leave out the pairs that are not")
        if values.numel() >= 1:
            self.mean = self.momentum * self.mean + (1.0 - self.momentum) * float(values.mean())
            self.mean_updates += 1
        if values.numel() >= 2:
            spread = float(values.std(correction=self.ddof))
            self.std = self.momentum * self.std + (1.0 - self.momentum) * spread
            self.std_updates += 1
        return self.current()

    def current(self) -> Moments:
        """Return the current moments: mean 0 and std None before the first update."""
        if self.start == "zero":
            return Moments(self.mean, self.std if self.std_updates else None)
        mean = self.mean / (1.0 - self.momentum**self.mean_updates) if self.mean_updates else 0.0
        std = self.std / (1.0 - self.momentum**self.std_updates) if self.std_updates else None
        return Moments(mean, std)

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the raw state, for `load_state_dict`."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the raw state from `state` exactly. Raises ValueError when its settings differ from these."""
        for name in ("momentum", "start", "ddof"):
            if state[name] != getattr(self, name):
                own = f"these are set to {name}={getattr(self, name)!r}"
                raise ValueError(f"the saved statistics have {name}={state[name]!r}, {own}")
        vars(self).update(state)
