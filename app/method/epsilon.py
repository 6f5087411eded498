"""ε-DPO (arXiv 2502.13177): β steps up or down according to how each pair's gap changes under a perturbed β.

The logits (1+ε)·logits_θ − ε·logits_ref approximate the policy under β/(1+ε); with −ε in place of ε they
approximate the policy under β/(1−ε). If a pair's log-ratio gap rises from −ε over 0 to +ε, the pair asks for a
smaller β; if the gap falls, for a larger β.
"""

from __future__ import annotations

import torch
from torch import Tensor


def perturbed_logits(policy_logits: Tensor, reference_logits: Tensor, epsilon: float) -> Tensor:
    """Return (1 + ε)·logits_θ − ε·logits_ref, both [..., V]; a negative `epsilon` gives the other direction.

    Normalised log-probs may replace the logits: the softmax of the result is the same. The form computed is
    logits_θ + ε·(logits_θ − logits_ref), which is bitwise logits_θ where the two are equal.
    """
    return policy_logits + epsilon * (policy_logits - reference_logits)


def epsilon_steps(gap_minus: Tensor, gap_zero: Tensor, gap_plus: Tensor) -> Tensor:
    """Return [B] int64: +1 where the gap rises strictly from −ε over 0 to +ε, −1 where it falls strictly, else 0.

    Each gap [B] is the log-probability of the chosen minus that of the rejected response, under −ε, 0 and +ε. The
    reference's log-probabilities add the same constant to all three and may be left out. NaN gives 0.
    """
    rises = (gap_minus < gap_zero) & (gap_zero < gap_plus)
    falls = (gap_minus > gap_zero) & (gap_zero > gap_plus)
    return rises.to(torch.int64) - falls.to(torch.int64)


def epsilon_beta(beta: float, epsilon: float, steps: Tensor) -> Tensor:
    """Return β_i = β/(1 + ε·step_i), [B] float64, for `steps` [B] and ε in (0, 1)."""
    return beta / (1.0 + epsilon * steps.to(torch.float64))


def next_epsilon_beta(beta: float, epsilon: float, steps: Tensor) -> float:
    """Return β for the next optimizer step, β/(1 + ε·mean(steps)), from `steps` [G] of the global batch.

    β is unchanged when there is no pair.
    """
    if steps.numel() == 0:
        return beta
    return beta / (1.0 + epsilon * float(steps.to(torch.float64).mean()))
