"""The β of a step or of a pair, from the reward gap or from a perturbed β; no gradient flows through it.

β-DPO (arXiv 2407.08639, section 4) sets β to β0·(1 + α·(M − M0)). ε-DPO (arXiv 2502.13177) moves β by a step
according to how each pair's gap changes under a perturbed β: (1+ε)·logits_θ − ε·logits_ref approximate the policy
under β/(1+ε), and with −ε in place of ε that under β/(1−ε). If a pair's log-ratio gap rises from −ε over 0 to +ε,
the pair asks for a smaller β; if the gap falls, for a larger β.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.method.moments import Moments

# The default floor of β, as a multiple of β0: the paper's 1e-3 at its β0 = 0.1. Raw gaps do reach it: with α = 0.6,
# the mean of 51 gaps with standard deviation 10 takes β there in one batch out of eight. A negative β would train
# towards the rejected response.
FLOOR = 0.01


def batch_beta(beta0: float, alpha: float, kept_discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return one β for the step, β0·(1 + α·(mean_{i∈K} M_i − M0)): 0-d float64, not clamped.

    `kept_discrepancy` [k] holds M of the pairs that the filter keeps. β is β0 when no pair is kept, and bitwise
    equal to β0 for α = 0.
    """
    kept = kept_discrepancy.detach().to(torch.float64)
    deviation = kept.mean() - moments.mean if kept.numel() else kept.new_zeros(())
    return beta0 * (1.0 + alpha * deviation)


def instance_beta(beta0: float, alpha: float, discrepancy: Tensor, moments: Moments) -> Tensor:
    """Return a β for every pair, β0·(1 + α·(M_i − M0)): [G] float64, not clamped.

    This is the paper's instance-level variant. A NaN discrepancy gives a NaN β for that pair only.
    """
    return beta0 * (1.0 + alpha * (discrepancy.detach().to(torch.float64) - moments.mean))


def perturbed_logits(policy_logits: Tensor, reference_logits: Tensor, epsilon: float) -> Tensor:
    """Return (1 + ε)·logits_θ − ε·logits_ref, both [..., V]; a negative `epsilon` gives the other direction.

    Normalised log-probs may replace the logits: the softmax of the result is the same. The form computed is
    logits_θ + ε·(logits_θ − logits_ref), which is bitwise logits_θ where the two are equal.
    """
    return policy_logits + epsilon * (policy_logits - reference_logits)


def epsilon_steps(gap_minus: Tensor, gap_zero: Tensor, gap_plus: Tensor) -> Tensor:
    """Return [B] int64: +1 where the gap rises strictly from −ε over 0 to +ε, −1 where it falls strictly, else 0.

    Each gap [B] is the log-probability of the chosen minus that of the rejected response; those of the reference
    would add the same constant to all three. NaN gives 0.
    """
    rises = (gap_minus < gap_zero) & (gap_zero < gap_plus)
    falls = (gap_minus > gap_zero) & (gap_zero > gap_plus)
    return rises.to(torch.int64) - falls.to(torch.int64)


def epsilon_beta(beta: float, epsilon: float, steps: Tensor) -> Tensor:
    """Return β_i = β/(1 + ε·step_i), [B] float64, for `steps` [B] and ε in (0, 1)."""
    return beta / (1.0 + epsilon * steps.to(torch.float64))


def next_epsilon_beta(beta: float, epsilon: float, steps: Tensor) -> float:
    """Return β/(1 + ε·mean step), β of the next optimizer step, for `steps` [G]; β itself if there is no pair."""
    return beta / (1.0 + epsilon * float(steps.to(torch.float64).mean())) if steps.numel() else beta
