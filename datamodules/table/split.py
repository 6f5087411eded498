"""A split into training and held-out pairs that share no prompt."""

from __future__ import annotations

import numpy as np

from app.errors import UserError


def split_by_prompt(prompt_keys: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (training, held-out) indices of N pairs, both sorted int64, with all pairs of a prompt on one side.

    Whole prompts are drawn at random until the held-out side has at least `share` of the pairs. The draw depends on
    the prompts and `seed`, not on the order of the pairs. Raises UserError if `share` is not in [0, 1) or leaves
    nothing to train on.
    """
    if not 0 <= share < 1:
        raise UserError(f"The held-out share is {share}: it must be at least 0 and less than 1.")
    keys, prompt_of_pair, sizes = np.unique(prompt_keys, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(keys))
    before = np.cumsum(sizes[order]) - sizes[order]  # pairs held out before each prompt is drawn
    held_out_prompt = np.zeros(len(keys), dtype=bool)
    held_out_prompt[order] = before < share * len(prompt_keys)
    held_out = held_out_prompt[prompt_of_pair]
    if len(prompt_keys) and held_out.all():
        raise UserError(
            f"A held-out share of {share} takes all {len(keys)} prompts: give more data or a smaller share."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
