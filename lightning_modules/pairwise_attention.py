"""Attention pair by pair, which skips everything that a dense mask would hide; it is the default on CPUs.

With a dense mask the cost of attention is quadratic in the row. Here it is the sum of the costs of the pairs, so
all pairs of a micro-batch can be in one row without padding. It needs no compiler and no special kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.pair_runs import PairRuns, register

PAIRWISE = "pairwise"  # its name in transformers


def piece_mask(runs: PairRuns, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
    """Return the additive mask [queries, keys] of the last `queries` of `keys` tokens; None if plain causal."""
    window = None if window is None or keys <= window else window
    if queries == keys and window is None:
        return None

    def make() -> Tensor:
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(hidden, -torch.inf).to(like.device)

    return runs.made((PAIRWISE, queries, keys, window, like.dtype), make)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: PairRuns,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """Compute attention pair by pair; see `pair_runs.Attend` for the arguments."""
    if softcap is not None:
        raise ValueError(f"attention {PAIRWISE} has no softcap")
    # a piece is the prompt with the first response, or one of the other responses
    sizes = [size for prompt, (first, *rest) in runs.runs for size in (prompt + first, *rest)]
    # split, because the gradient of a slice is as large as the whole tensor
    queries, keys, values = (states.split(sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []
    for prompt, responses in runs.runs:
        whole = len(outputs)
        for number in range(len(responses)):
            q, k, v = (pieces[len(outputs)] for pieces in (queries, keys, values))
            if number:
                k, v = (torch.cat([p[whole][:, :, :prompt], own], 2) for p, own in ((keys, k), (values, v)))
            mask = piece_mask(runs, q.shape[2], k.shape[2], window, q)
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
    return torch.cat(outputs, 2)


register(PAIRWISE, attend)
