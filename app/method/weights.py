"""Weights on the losses of a step's kept pairs, and RE-PO's confidence in labels; constants to the gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_WEIGHT = 10.0  # of KLDPO, in its authors' code
LEAST = 1e-12  # of a reliability η and of 1 − η: at 0 or 1 no later pair could move the posterior


def dr_dpo_loss(losses: Tensor, temperature: float) -> Tensor:
    """Return Dr. DPO's loss of a batch, −β′·log mean exp(−ℓ/β′), 0-d, for `losses` ℓ [n] and `temperature` β′.

    A large loss is taken for a wrong label (arXiv 2407.07880; `trainers.py` in junkangwu/Dr_DPO).
    """
    return -temperature * (torch.logsumexp(-losses / temperature, dim=0) - math.log(max(losses.numel(), 1)))


def dr_dpo_weights(losses: Tensor, temperature: float) -> Tensor:
    """Return n·softmax(−ℓ/β′) [n]: mean(w·ℓ) with these constants w has the gradient of `dr_dpo_loss`."""
    return losses.numel() * torch.softmax(-losses.detach() / temperature, dim=0)


def kldpo_weights(losses: Tensor, temperature: float) -> Tensor:
    """Return min(10, exp((ℓ − mean ℓ)/τ)) [n] for `losses` ℓ [n] and `temperature` τ.

    A large loss is what to prepare for (arXiv 2502.01930; TheBlackCat22/distributionally_robust_dpo).
    """
    losses = losses.detach()
    return torch.exp((losses - losses.mean()) / temperature).clamp(max=LARGEST_WEIGHT)


def madpo_weights(score_gap: Tensor, largest: float, smallest: float, slope: float, threshold: float) -> Tensor:
    """Return MADPO's weight σ(c·r)/σ(r) of pairs with the reward gap r = `score_gap` [n], 1 where r ≤ −τ.

    c = c_min + (c_max − c_min)/(1 + (c_max − 1)/(1 − c_min)·exp(λ·(|r| − τ))) lies between `smallest` c_min < 1
    and `largest` c_max > 1, falls with |r| at the `slope` λ and is 1 at the `threshold` τ: pairs with a small
    reward gap count more. (arXiv 2510.05342; `utils/loss_functions.py` in
    sirano1004/Margin-Apative-Direct-Preference-Optimization.)
    """
    gap = score_gap.to(torch.float64)
    # an infinite exponential times c_max − 1 = 0 would be NaN
    rise = torch.exp((slope * (gap.abs() - threshold)).clamp(max=700.0)) * (largest - 1.0) / (1.0 - smallest)
    factor = smallest + (largest - smallest) / (1.0 + rise)
    ratio = torch.exp(F.logsigmoid(factor * gap) - F.logsigmoid(gap))
    return torch.where(gap > -threshold, ratio, torch.ones_like(gap))


def quality_weights(score_gap: Tensor, slope: float) -> Tensor:
    """Return σ(η·(S_w − S_l)) [n], η = `slope`, of Omni-DPO (arXiv 2506.10054; `compute_w_qual` of Uni-DPO)."""
    return torch.sigmoid(slope * score_gap.to(torch.float64))


def label_confidence(label_logits: Tensor, reliability: Tensor) -> Tensor:
    """Return RE-PO's w = ηp/(ηp + (1 − η)(1 − p)) [n], for log p/(1 − p) and η (arXiv 2509.24159, eq. 4)."""
    return torch.sigmoid(label_logits.detach() + torch.logit(reliability))


def updated_reliability(
    reliability: Mapping[str, float], annotators: Sequence[str], confidence: Tensor, momentum: float
) -> dict[str, float]:
    """Return η ← (1 − a)·η + a·mean w of the batch's annotators, a = `momentum`, in [LEAST, 1 − LEAST]."""
    updated, places = dict(reliability), defaultdict(list)
    for place, name in enumerate(annotators):
        places[name].append(place)
    for name, own in places.items():
        newest = (1.0 - momentum) * reliability[name] + momentum * float(confidence[own].mean())
        updated[name] = min(max(newest, LEAST), 1.0 - LEAST)
    return updated
