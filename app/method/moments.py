"""Running mean M0 and standard deviation σ of the reward discrepancy (β-DPO, arXiv 2407.08639, section 4)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from app.method.ranges import ShareBelowOne, checked

MINIMUM_STD = 1e-6  # σ of M below which all pairs count as equal


def rounding_std(compute_dtype: torch.dtype) -> float:
    """σ of h, in nats, that the rounding of a forward pass in `compute_dtype` explains.

    In bfloat16 two kernels that compute the same were seen to differ by a σ of .06 over a batch, and real first
    steps to have a σ of .1 or more: the bound lies between.
    """
    return 0.08 if compute_dtype == torch.bfloat16 else MINIMUM_STD


@dataclass(frozen=True)
class Moments:
    """M0 and σ as one step uses them, in the units of the discrepancy M.

    `std` is None until a batch with at least two pairs was seen: one pair says nothing about the spread. A σ below
    `minimum_std` is taken for rounding.
    """

    mean: float
    std: float | None
    minimum_std: float = MINIMUM_STD

    @property
    def spread(self) -> float | None:
        """σ, or None where it is unknown or too small to tell pairs apart."""
        return None if self.std is None or self.std < self.minimum_std else self.std

    def z_scores(self, discrepancy: Tensor) -> Tensor:
        """(M_i − M0)/σ, float64 and detached, of the shape of `discrepancy`; NaN where M_i is NaN.

        All zeros without a `spread`: at the normal first step the policy equals the reference, every gap is 0,
        and so is σ.
        """
        discrepancy = discrepancy.detach().to(torch.float64)
        if self.spread is None:
            return torch.zeros_like(discrepancy).masked_fill(torch.isnan(discrepancy), math.nan)
        return (discrepancy - self.mean) / self.spread


@checked
@dataclass
class RunningMoments:
    """Exponential moving averages of the batch mean and of the batch standard deviation.

    M0 ← m·M0 + (1−m)·mean(M) and σ ← m·σ + (1−m)·std(M), updated *before* the step uses them. The average of
    the standard deviations is kept, not the root of an averaged variance, as in the paper.

    The averages lag: a mean that grows by d per step stands d·m/(1−m) above M0 (9·d for m = 0.9), so a
    steadily growing gap alone raises a batch-level β.

    momentum: m in [0, 1).
    start: "bias_corrected" divides by 1 − m^t as Adam does; "zero" leaves the averages as they grow from
        zero, like the authors' released code (σ is ten times too small at the first step).
    ddof: 0 is the population standard deviation, 1 Bessel's correction (the released code).

    `mean`, `std`, `mean_updates` and `std_updates` are the raw state, Python numbers only so that any
    checkpoint format keeps them to the bit. Raises ValueError for a momentum, start or ddof out of range.
    """

    momentum: ShareBelowOne = 0.9
    start: Literal["bias_corrected", "zero"] = "bias_corrected"
    ddof: int = 0
    mean: float = 0.0
    std: float = 0.0
    mean_updates: int = 0
    std_updates: int = 0

    def __post_init__(self) -> None:
        if self.start not in ("bias_corrected", "zero"):
            raise ValueError(f'start must be "bias_corrected" or "zero", got {self.start!r}')
        if self.ddof not in (0, 1):
            raise ValueError(f"ddof must be 0 or 1, got {self.ddof}")

    def update(self, values: Tensor) -> Moments:
        """Take in the discrepancies `values` [n] of a global batch and return the moments to use for it.

        No value: nothing changes. One value: M0 moves and σ does not. Raises ValueError when a value is not
        finite, because a NaN would stay in the averages for ever: leave such pairs out first.
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
        """The moments as they stand; mean 0 and std None before the first update."""
        return Moments(
            mean=self._corrected(self.mean, self.mean_updates),
            std=self._corrected(self.std, self.std_updates) if self.std_updates else None,
        )

    def _corrected(self, average: float, updates: int) -> float:
        if self.start == "zero" or updates == 0:
            return average
        return average / (1.0 - self.momentum**updates)

    def state_dict(self) -> dict[str, Any]:
        """Settings and raw state; `load_state_dict` restores both exactly."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises ValueError when it was made with other settings than these."""
        for name in ("momentum", "start", "ddof"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved statistics have {name}={state[name]!r}, "
                    f"these are set to {name}={getattr(self, name)!r}"
                )
        self.mean, self.std = float(state["mean"]), float(state["std"])
        self.mean_updates, self.std_updates = int(state["mean_updates"]), int(state["std_updates"])
