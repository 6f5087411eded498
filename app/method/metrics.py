"""Metrics of a batch of pairs, one value per pair, so that a mean can be taken over any set of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from app.method.logps import PairLogps
from app.method.pair_loss import PairLoss


def pair_metrics(logps: PairLogps, loss: PairLoss, beta: Tensor) -> dict[str, Tensor]:
    """Return per-pair metrics [B] under β [B]: rewards, their margin and accuracy, log-probabilities.

    The implicit reward is β·(log π − log π_ref) (DPO eq. 6); without a reference, β·log π/|y| (SimPO eq. 4). A tie
    counts as half correct, so that an untrained policy scores 0.5 and not 0. A NaN in either response gives NaN in
    every metric that uses it.
    """
    ranked: dict[str, Tensor] = {}
    if loss.needs_reference:
        chosen, rejected = logps.chosen_log_ratio, logps.rejected_log_ratio
        # the accuracy of the SFT model itself, before preference training
        assert logps.reference_chosen is not None
        assert logps.reference_rejected is not None
        ranked["reference_accuracy"] = _ranked_right(logps.reference_chosen, logps.reference_rejected)
        # displacement: how far each response's log-probability has moved from the reference's, in nats
        ranked["log_ratio_chosen"], ranked["log_ratio_rejected"] = chosen, rejected
    else:
        chosen = logps.policy_chosen / logps.chosen_tokens
        rejected = logps.policy_rejected / logps.rejected_tokens
    beta = beta.to(chosen)
    return {
        "reward_accuracy": _ranked_right(chosen, rejected),
        "reward_margin": beta * (chosen - rejected),
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
        "logp_chosen": logps.policy_chosen,
        "logp_rejected": logps.policy_rejected,
        # whether the policy alone, without the reference, gives the chosen response the higher probability
        "policy_accuracy": _ranked_right(logps.policy_chosen, logps.policy_rejected),
        **ranked,
    }


def _ranked_right(chosen: Tensor, rejected: Tensor) -> Tensor:
    difference = chosen - rejected
    return ((1 + torch.sign(difference)) / 2).where(~difference.isnan(), torch.nan)  # torch's sign(NaN) is 0
