"""Who may look at whom in a packed row: every response sees its own prompt and itself, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from app.method.batch import PackedRows
from lightning_modules.pairwise_attention import PAIRWISE, PairRuns


def dense_mask(rows: PackedRows, window: int | None = None) -> Tensor:
    """Boolean mask [R, 1, T, T], True where the query (second last axis) may attend to the key (last).

    Padding attends to padding, so no row of the softmax is empty. `window` counts positions within the pair,
    as a model with sliding-window attention does on a plain row.
    """
    same_group = rows.group[:, :, None] == rows.group[:, None, :]
    visible_part = (rows.part[:, None, :] == 0) | (rows.part[:, :, None] == rows.part[:, None, :])
    width = rows.input_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=rows.group.device).tril()
    mask = same_group & visible_part & causal
    if window is not None:
        mask &= rows.position_ids[:, :, None] - rows.position_ids[:, None, :] < window
    return mask[:, None]


def additive_mask(rows: PackedRows, window: int | None = None) -> Tensor:
    """The same rule as a float mask [R, 1, T, T] to be added to the scores: 0 where allowed, else very negative."""
    forbidden = ~dense_mask(rows, window)
    zeros = torch.zeros(forbidden.shape, device=forbidden.device)
    return zeros.masked_fill(forbidden, torch.finfo(zeros.dtype).min)


def flex_mask(rows: PackedRows, window: int | None = None) -> BlockMask:
    """The same rule as a FlexAttention block mask: blocks without an allowed pair of tokens cost nothing."""
    group, part, position = rows.group, rows.part, rows.position_ids

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_group = group[row, query] == group[row, key]
        visible_part = (part[row, key] == 0) | (part[row, key] == part[row, query])
        mask = same_group & visible_part & (key <= query)
        if window is not None:
            mask = mask & (position[row, query] - position[row, key] < window)
        return mask

    height, width = rows.input_ids.shape
    return create_block_mask(allowed, height, None, width, width, device=str(group.device))


def attention_inputs(rows: PackedRows, config: Any) -> dict[str, Any]:
    """What a Hugging Face decoder with this `config` takes beside tokens and positions, to see its own pair only.

    Made once for each kind of mask and kept with the rows: layers, policy and reference share it.
    Pair by pair, attention takes the runs and no mask. `separate` rows are plain right-padded rows: a
    two-dimensional mask, and the model does the rest. A packed row needs the block mask; transformers then leaves
    out the model's own sliding window, so it is put in here. Eager attention adds whatever mask it is given: a
    boolean one would let every token see every other.
    """
    implementation = config._attn_implementation
    if implementation == PAIRWISE:
        return {"pair_runs": rows.remember(PAIRWISE, lambda: PairRuns.of(rows))}
    if rows.layout == "separate":
        return {"attention_mask": (rows.group >= 0).long()}
    special: dict[str, Callable[..., Tensor | BlockMask]] = {"flex_attention": flex_mask, "eager": additive_mask}
    build = special.get(implementation, dense_mask)

    def mask(window: int | None = None) -> Any:
        return rows.remember((build.__name__, window), lambda: build(rows, window))

    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return {"attention_mask": mask()}
    if getattr(config, "layer_types", None):
        return {"attention_mask": {"full_attention": mask(), "sliding_attention": mask(window)}}
    return {"attention_mask": mask(window)}
