"""Which pairs of a global batch are trained on: the Gaussian filter of β-DPO and those it is compared with.

The Gaussian filter (arXiv 2407.08639, section 4) draws pairs without replacement with
p_i ∝ exp(−(M_i − M0)²/2σ²). Everything stays in log space, where a pair 50 σ away from M0 is merely unlikely
and does not underflow to probability zero.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from app.method.moments import Moments


def gaussian_log_weights(discrepancy: Tensor, moments: Moments, minimum_std: float | None = None) -> Tensor:
    """Log of the unnormalised selection weights, −(M_i − M0)²/2σ² [G] float64, for the discrepancies M [G].

    All zeros (every pair equally likely) when σ is unknown or below `minimum_std`, by default that of `moments`:
    at the normal first step the policy equals the reference, every gap is 0, and so is σ. A discrepancy that is
    not finite gets −inf.
    """
    if minimum_std is not None:
        moments = replace(moments, minimum_std=minimum_std)
    log_weights = -0.5 * moments.z_scores(discrepancy) ** 2
    return log_weights.masked_fill(~torch.isfinite(discrepancy), -math.inf)


def number_kept(n: int, keep_ratio: float) -> int:
    """k = clamp(⌊n·ρ + 1e-9⌋, 1, n), how many of `n` pairs the fraction ρ = `keep_ratio` keeps; 0 for n = 0.

    The 1e-9 keeps 100·0.29 and its like from losing a pair to rounding. Raises ValueError unless 0 < ρ ≤ 1.
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio is the fraction of pairs kept and must lie in (0, 1], got {keep_ratio}")
    if n == 0:
        return 0
    return min(max(math.floor(n * keep_ratio + 1e-9), 1), n)


def selection_noise(seed: int, step: int, count: int) -> Tensor:
    """Uniform noise in the open interval (0, 1), [count] float64; value i is for pair i of the global batch.

    A function of (seed, step) alone: equal on every rank however much of the global random stream each of
    them has used, and equal after a resume. The global generators are neither read nor moved.
    """
    # Hashed, because generators seeded with neighbouring integers may start alike.
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    # The midpoints of 2^52 equal cells: neither 0 nor 1 can come out, and each is exact in float64.
    cells = torch.randint(2**52, (count,), generator=generator, dtype=torch.int64)
    return (cells.to(torch.float64) + 0.5) / 2.0**52


def gumbel_top_k(log_weights: Tensor, k: int, uniform: Tensor) -> Tensor:
    """A bool mask [G] with exactly `k` True: k pairs drawn without replacement ∝ exp(`log_weights` [G]).

    The k largest of log w_i − log(−log u_i) follow the same law as k successive draws (Gumbel-top-k,
    arXiv 1903.06059), for any shift of the weights and without exponentiating them. `uniform` [G] is noise in
    (0, 1). A weight of −inf is taken only when fewer than k finite ones exist.

    Raises ValueError for k outside [0, G], lengths that differ, weights of NaN or +inf, noise outside (0, 1).
    """
    log_weights = log_weights.detach().to(torch.float64)
    if log_weights.shape != uniform.shape:
        raise ValueError(f"{log_weights.numel()} weights need as much noise, got {uniform.numel()}")
    if not 0 <= k <= log_weights.numel():
        raise ValueError(f"cannot keep {k} of {log_weights.numel()} pairs")
    # topk ranks NaN above every number: a NaN weight would win always.
    if not bool((log_weights < math.inf).all()):
        raise ValueError("log weights must be finite or −inf")
    if not bool(((uniform > 0) & (uniform < 1)).all()):
        raise ValueError("the noise must lie in the open interval (0, 1)")
    keys = log_weights - torch.log(-torch.log(uniform.to(log_weights)))
    kept = torch.zeros_like(log_weights, dtype=torch.bool)
    kept[torch.topk(keys, k).indices] = True
    return kept


def keep_by_gradient_scale(gaps: Tensor, k: int, drop: Literal["head", "tail", "both"], uniform: Tensor) -> Tensor:
    """A bool mask [G] with `k` True: the gaps h [G] without the pairs of extreme gradient scale σ(−β·h).

    The scale falls as h grows, whatever β: "head" drops the largest scales, the pairs with the smallest gaps;
    "tail" the smallest scales, the largest gaps; "both" half from each end, the odd one from the head. Pairs
    with equal gaps, as all are at the first step, are ordered by the noise `uniform` [G] in (0, 1). A gap
    that is not finite is never kept. Raises ValueError for k beyond the number of finite gaps.
    """
    # sorted by noise first, then stably by gap
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
    """(Σp)²/Σp² in [1, G]: how many equally weighted pairs the weights exp(`log_weights` [G]) are worth.

    G when all are equal, near 1 when one pair dominates, 0 when no pair has a finite log weight.
    """
    finite = log_weights[torch.isfinite(log_weights)].to(torch.float64)
    if finite.numel() == 0:
        return 0.0
    return float(1.0 / torch.softmax(finite, dim=0).square().sum())
