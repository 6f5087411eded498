"""The check of an export, which compares log-probabilities of the policy before writing and after reading back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from app.core.errors import UserError

SEQUENCES, TOKENS = 2, 48
LARGEST = 2_000_000_000  # parameters; a larger model would take minutes and tens of GB to read back
TOLERANCE = 2e-3  # nats per token; merged adapters round far less, a lost tie or rotary base changes far more


@torch.no_grad()
def sequence_logps(model: Any) -> Tensor:
    """Return log π [2, 47] of the tokens of random sequences, the same sequences for every model of a vocabulary.

    Fewer tokens are used if the model takes fewer positions. Raises UserError if a value is not finite.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or TOKENS
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (SEQUENCES, min(TOKENS, longest)), generator=draw)
    logps = torch.log_softmax(model.eval()(input_ids=ids).logits.float(), dim=-1)[:, :-1]
    found = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    if not found.isfinite().all():
        raise UserError("The policy's log-probabilities are not finite: export an earlier checkpoint.")
    return found


def check_equal(policy: Tensor, exported: Tensor) -> None:
    """Raise UserError unless the two agree up to rounding."""
    apart = float((policy - exported).abs().max())
    if not apart <= TOLERANCE:
        raise UserError(
            "The export, read again, does not compute what the policy does: log-probabilities differ by up to "
            f"{apart:.3g} nats per token, so it was removed. Please report the model's family."
        )


def described_rounding(policy: Tensor, rounded: Tensor) -> str:
    """Return in words how much the rounding to a narrower type changes the log-probabilities."""
    apart = (policy - rounded).abs()
    return f"rounding moves log-probabilities by {apart.mean():.2g} nats per token, at most {apart.max():.2g}"
