"""The filters that select pairs of a global batch for training: β-DPO's Gaussian filter and its alternatives.

The Gaussian filter (arXiv 2407.08639, section 4) draws pairs without replacement ∝ exp(−(M_i − M0)²/2σ²), in log
space, where the probability of a pair 50 σ away from M0 does not underflow to zero.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

from app.method.moments import Moments


def gaussian_log_weights(discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return the log of the unnormalised selection weights, −(M_i − M0)²/2σ² [G] float64, for M [G].

    All are zero (every pair equally likely) without a `Moments.spread`, as at the first step. A discrepancy that is
    not finite gets −inf.
    """
    log_weights = -0.5 * moments.z_scores(discrepancy) ** 2
    return log_weights.masked_fill(~torch.isfinite(discrepancy), -math.inf)


def number_kept(n: int, keep_ratio: float) -> int:
    """Return k = clamp(⌊n·ρ + 1e-9⌋, 1, n), the number of `n` pairs that ρ = `keep_ratio` keeps; 0 for n = 0.

    The 1e-9 prevents the loss of a pair to rounding, as in 100·0.29. Raises ValueError unless 0 < ρ ≤ 1.
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio is the fraction of pairs kept and must lie in (0, 1], got {keep_ratio}")
    return min(max(math.floor(n * keep_ratio + 1e-9), 1), n)


def selection_noise(seed: int, step: int, count: int) -> Tensor:
    """Return uniform noise in the open interval (0, 1), [count] float64; value i is for pair i of the global batch.

    The noise is a function of (seed, step) alone, so it is equal on every rank and after a resume. The global
    generators are neither read nor advanced.
    """
    # The seed is hashed because generators seeded with neighbouring integers may start alike.
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    # The midpoints of 2^52 equal cells are never 0 or 1, and each is exact in float64.
    cells = torch.randint(2**52, (count,), generator=generator, dtype=torch.int64)
    return (cells.to(torch.float64) + 0.5) / 2.0**52


def gumbel_top_k(log_weights: Tensor, k: int, uniform: Tensor) -> Tensor:
    """Return a bool mask [G] with `k` True: k pairs drawn without replacement ∝ exp(`log_weights` [G]).

    The k largest of log w_i − log(−log u_i) have the same distribution as k successive draws (Gumbel-top-k,
    arXiv 1903.06059). A constant added to the log weights changes nothing, and no exponential is computed.
    `uniform` [G] is noise in (0, 1). A weight of −inf is drawn only when fewer than k finite weights exist.

    Raises ValueError for k outside [0, G], different lengths, a weight of NaN or +inf, or noise outside (0, 1).
    """
    log_weights = log_weights.detach().to(torch.float64)
    if log_weights.shape != uniform.shape:
        raise ValueError(f"{log_weights.numel()} weights need as much noise, got {uniform.numel()}")
    if not 0 <= k <= log_weights.numel():
        raise ValueError(f"cannot keep {k} of {log_weights.numel()} pairs")
    # topk ranks NaN above every number, so a NaN weight would always be drawn.
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

    The scale falls as h grows, for any β. "head" drops the largest scales, which belong to the smallest gaps.
    "tail" drops the smallest scales, which belong to the largest gaps. "both" drops half from each end and, of an
    odd number, one more from the head. The noise `uniform` [G] in (0, 1) orders pairs with equal gaps, such as all
    pairs of the first step. A gap that is not finite is never kept. Raises ValueError unless k lies between 0 and
    the number of finite gaps.
    """
    # sort by noise, then stably by gap, so that the noise orders equal gaps
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
    """Return (Σp)²/Σp², the number of equally weighted pairs that exp(`log_weights` [G]) corresponds to.

    It is G when all weights are equal, near 1 when one pair dominates, and 0 when no log weight is finite.
    """
    finite = log_weights[torch.isfinite(log_weights)].to(torch.float64)
    if finite.numel() == 0:
        return 0.0
    return float(1.0 / torch.softmax(finite, dim=0).square().sum())
