"""Whether a folder holds the policy: log-probabilities of a few sequences, before writing and after reading."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from app.errors import UserError

SEQUENCES, TOKENS = 2, 48
LARGEST = 2_000_000_000  # parameters; a larger model would take minutes and tens of GB to read once more
TOLERANCE = 2e-3  # nats per token: rounding of merged adapters is far below, a lost tie or rotary base far above


@torch.no_grad()
def sequence_logps(model: Any) -> Tensor:
    """Return log π [2, 47] of the tokens of random sequences, the same for every model of one vocabulary.

    Raises UserError when one is not finite.
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
    """Raise UserError unless the two agree but for rounding."""
    apart = float((policy - exported).abs().max())
    if not apart <= TOLERANCE:
        raise UserError(
            "The export, read again, does not compute what the policy does: log-probabilities differ by up to "
            f"{apart:.3g} nats per token, so it was removed. Please report the model's family."
        )


def described_rounding(policy: Tensor, rounded: Tensor) -> str:
    """Say what a narrower type costs."""
    apart = (policy - rounded).abs()
    return f"rounding moves log-probabilities by {apart.mean():.2g} nats per token, at most {apart.max():.2g}"
