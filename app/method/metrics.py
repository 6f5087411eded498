"""What is reported of a batch of pairs: per-pair quantities that any mean over pairs can be taken of."""

from __future__ import annotations

import torch
from torch import Tensor

from app.method.logps import PairLogps
from app.method.losses import PairLoss


def pair_metrics(logps: PairLogps, loss: PairLoss, beta: Tensor) -> dict[str, Tensor]:
    """Per-pair metrics [B] under β [B]: rewards, their margin and accuracy, log-probabilities.

    The implicit reward is β·(log π − log π_ref) (DPO eq. 6); without a reference, β·log π/|y| (SimPO eq. 4).
    A tie counts as half right, so an untrained policy scores one half and not zero; what is not a number on
    either side is NaN in every metric that it enters.
    """
    ranked: dict[str, Tensor] = {}
    if loss.needs_reference:
        chosen, rejected = logps.chosen_log_ratio, logps.rejected_log_ratio
        # what the SFT model itself ranked right before any preference training
        assert logps.reference_chosen is not None
        assert logps.reference_rejected is not None
        ranked["reference_accuracy"] = _ranked_right(logps.reference_chosen, logps.reference_rejected)
        # displacement: how far the probability of each response has moved away from the reference's, in nats
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
        # does the policy itself, reference aside, find the chosen response likelier?
        "policy_accuracy": _ranked_right(logps.policy_chosen, logps.policy_rejected),
        **ranked,
    }


def _ranked_right(chosen: Tensor, rejected: Tensor) -> Tensor:
    difference = chosen - rejected
    return ((1 + torch.sign(difference)) / 2).where(~difference.isnan(), torch.nan)  # torch's sign(NaN) is 0
