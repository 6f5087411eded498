"""The numbers of β-DPO: running moments of the discrepancy M, filters, and β; no gradient flows through them.

β-DPO (arXiv 2407.08639, section 4) sets β to β0·(1 + α·(M − M0)) and draws the pairs to train on ∝
exp(−(M_i − M0)²/2σ²), in log space, where the probability of a pair 50 σ away from M0 does not underflow to zero.

ε-DPO (arXiv 2502.13177) moves β by a step according to how each pair's gap changes under a perturbed β:
(1+ε)·logits_θ − ε·logits_ref approximate the policy under β/(1+ε), and with −ε in place of ε that under β/(1−ε).
If a pair's log-ratio gap rises from −ε over 0 to +ε, the pair asks for a smaller β; if it falls, for a larger β.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from app.method.ranges import ShareBelowOne, checked

MINIMUM_STD = 1e-6  # below this σ of M, all pairs count as equal
# the same for h in bfloat16, in nats: equivalent kernels differed with a σ of .06; real runs began with .1 or more
BFLOAT16_STD = 0.08
# The default floor of β, as a multiple of β0: the paper's 1e-3 at its β0 = 0.1. A negative β would train towards
# the rejected response; with α = 0.6, the mean of 51 gaps of σ = 10 would give one in one batch out of eight.
FLOOR = 0.01


@dataclass(frozen=True)
class Moments:
    """The M0 and σ that one step uses, in the units of the discrepancy M."""

    mean: float
    std: float | None  # None before the first batch with two pairs, because one has no spread
    minimum_std: float = MINIMUM_STD  # a smaller σ is rounding

    @property
    def spread(self) -> float | None:
        """Return σ, or None if it is unknown or too small to tell pairs apart."""
        return None if self.std is None or self.std < self.minimum_std else self.std

    def z_scores(self, discrepancy: Tensor) -> Tensor:
        """Return (M_i − M0)/σ, float64, detached: zeros without a `spread`, as in the first step; NaN of NaN."""
        discrepancy = discrepancy.detach().to(torch.float64)
        if self.spread is None:
            return torch.zeros_like(discrepancy).masked_fill(torch.isnan(discrepancy), math.nan)
        return (discrepancy - self.mean) / self.spread


@checked
@dataclass
class RunningMoments:
    """The exponential moving averages of the batch mean and of the batch standard deviation.

    M0 ← m·M0 + (1−m)·mean(M) and σ ← m·σ + (1−m)·std(M), updated *before* the step uses them. As in the paper, σ
    averages standard deviations. The averages lag: a batch mean that grows by d per step stays d·m/(1−m) above M0
    (9·d for m = 0.9), so a steadily growing gap alone raises a batch-level β.

    `start`: "bias_corrected" divides by 1 − m^t as Adam does; "zero" is the authors' released code (with m = 0.9, σ
    is ten times too small at the first step), as is `ddof` 1. The other fields are the raw state: Python numbers,
    which every checkpoint format stores exactly.
    """

    momentum: ShareBelowOne = 0.9
    start: Literal["bias_corrected", "zero"] = "bias_corrected"
    ddof: Literal[0, 1] = 0
    mean: float = 0.0
    std: float = 0.0
    mean_updates: int = 0
    std_updates: int = 0

    def update(self, values: Tensor) -> Moments:
        """Add the M [n] of a global batch and return its moments; one value changes M0 alone."""
        values = values.detach().to("cpu", torch.float64).reshape(-1)
        if not bool(torch.isfinite(values).all()):
            # a NaN would never leave the averages
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
        """Restore the raw state. Raises ValueError when its settings differ from these."""
        for name in ("momentum", "start", "ddof"):
            if state[name] != getattr(self, name):
                own = f"these are set to {name}={getattr(self, name)!r}"
                raise ValueError(f"the saved statistics have {name}={state[name]!r}, {own}")
        vars(self).update(state)


def gaussian_log_weights(discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return log weights −(M_i − M0)²/2σ² [G] float64: 0 without a spread, −inf where M_i is not finite."""
    log_weights = -0.5 * moments.z_scores(discrepancy) ** 2
    return log_weights.masked_fill(~torch.isfinite(discrepancy), -math.inf)


def number_kept(n: int, keep_ratio: float) -> int:
    """Return k = clamp(⌊n·ρ + 1e-9⌋, 1, n), the number of `n` pairs that ρ = `keep_ratio` keeps; 0 for n = 0."""
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio is the fraction of pairs kept and must lie in (0, 1], got {keep_ratio}")
    return min(max(math.floor(n * keep_ratio + 1e-9), 1), n)  # 1e-9: 100·0.29 would lose a pair to rounding


def selection_noise(seed: int, step: int, count: int) -> Tensor:
    """Return uniform noise in (0, 1), [count] float64, from (seed, step) alone: equal on all ranks and resumes."""
    # The seed is hashed because generators seeded with neighbouring integers may start alike.
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    # the midpoints of 2^52 equal cells are never 0 or 1, and each is exact in float64
    cells = torch.randint(2**52, (count,), generator=generator, dtype=torch.int64)
    return (cells.to(torch.float64) + 0.5) / 2.0**52


def gumbel_top_k(log_weights: Tensor, k: int, uniform: Tensor) -> Tensor:
    """Return a bool mask [G] with `k` True: k pairs drawn without replacement ∝ exp(`log_weights` [G]).

    The k largest of log w_i − log(−log u_i), for noise u in (0, 1), `uniform` [G], have the same distribution as k
    successive draws (Gumbel-top-k, arXiv 1903.06059). A weight of −inf is drawn only if too few are finite.
    """
    log_weights = log_weights.detach().to(torch.float64)
    if log_weights.shape != uniform.shape:
        raise ValueError(f"{log_weights.numel()} weights need as much noise, got {uniform.numel()}")
    if not 0 <= k <= log_weights.numel():
        raise ValueError(f"cannot keep {k} of {log_weights.numel()} pairs")
    # topk ranks NaN above every number
    if not bool((log_weights < math.inf).all()):
        raise ValueError("log weights must be finite or −inf")
    if not bool(((uniform > 0) & (uniform < 1)).all()):
        raise ValueError("the noise must lie in the open interval (0, 1)")
    keys = log_weights - torch.log(-torch.log(uniform.to(log_weights)))
    kept = torch.zeros_like(log_weights, dtype=torch.bool)
    kept[torch.topk(keys, k).indices] = True
    return kept


def keep_by_gradient_scale(gaps: Tensor, k: int, drop: Literal["head", "tail", "both"], uniform: Tensor) -> Tensor:
    """Return a bool mask [G] with `k` True that drops the pairs with extreme gradient scale σ(−β·h), by gaps h [G].

    The scale falls as h grows, for any β: "head" drops the smallest gaps, "tail" the largest, "both" half from each
    end and, of an odd number, one more from the head. A gap that is not finite is never kept.
    """
    # sort by noise, then stably by gap, so that the noise [G] in (0, 1) orders equal gaps, as all of the first step
    order = uniform.argsort()
    order = order[gaps[order].argsort(stable=True)]
    order = order[torch.isfinite(gaps[order])]
    dropped = order.numel() - k
    if not 0 <= dropped <= order.numel():
        raise ValueError(f"cannot keep {k} of {order.numel()} pairs with a finite gap")
    start = {"head": dropped, "tail": 0, "both": dropped - dropped // 2}[drop]
    kept = torch.zeros_like(gaps, dtype=torch.bool)
    kept[order[start : start + k]] = True
    return kept


def effective_sample_size(log_weights: Tensor) -> float:
    """Return (Σp)²/Σp² of p = exp(`log_weights` [G]): G if all are equal, near 1 if one dominates."""
    finite = log_weights[torch.isfinite(log_weights)].to(torch.float64)
    return float(1.0 / torch.softmax(finite, dim=0).square().sum()) if finite.numel() else 0.0


def batch_beta(beta0: float, alpha: float, kept_discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return β0·(1 + α·(mean of the kept pairs' M [k] − M0)), 0-d float64, not clamped; β0 if no pair is kept."""
    kept = kept_discrepancy.detach().to(torch.float64)
    deviation = kept.mean() - moments.mean if kept.numel() else kept.new_zeros(())
    return beta0 * (1.0 + alpha * deviation)


def instance_beta(beta0: float, alpha: float, discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return a β for every pair, β0·(1 + α·(M_i − M0)), the paper's variant: [G] float64, not clamped."""
    return beta0 * (1.0 + alpha * (discrepancy.detach().to(torch.float64) - moments.mean))


def perturbed_logits(policy_logits: Tensor, reference_logits: Tensor, epsilon: float) -> Tensor:
    """Return (1 + ε)·logits_θ − ε·logits_ref [..., V], from logits or log-probabilities."""
    # in this form bitwise logits_θ where the two are equal
    return policy_logits + epsilon * (policy_logits - reference_logits)


def epsilon_steps(gap_minus: Tensor, gap_zero: Tensor, gap_plus: Tensor) -> Tensor:
    """Return [B] int64: +1 where the gap rises strictly from −ε over 0 to +ε, −1 where it falls, else 0."""
    # the reference's log-probabilities would add one constant to all three; NaN gives 0
    rises = (gap_minus < gap_zero) & (gap_zero < gap_plus)
    falls = (gap_minus > gap_zero) & (gap_zero > gap_plus)
    return rises.to(torch.int64) - falls.to(torch.int64)


def epsilon_beta(beta: float, epsilon: float, steps: Tensor) -> Tensor:
    """Return β_i = β/(1 + ε·step_i), [B] float64, for `steps` [B] and ε in (0, 1)."""
    return beta / (1.0 + epsilon * steps.to(torch.float64))


def next_epsilon_beta(beta: float, epsilon: float, steps: Tensor) -> float:
    """Return β/(1 + ε·mean step), β of the next optimizer step, for `steps` [G]; β itself if there is no pair."""
    return beta / (1.0 + epsilon * float(steps.to(torch.float64).mean())) if steps.numel() else beta
