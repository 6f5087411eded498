"""Who may look at whom in a packed row: every response sees its own prompt and itself, nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from app.method.batch import PackedRows, PairRun
from lightning_modules import varlen
from lightning_modules.flex import BLOCK, FLEX, LEAST
from lightning_modules.pair_runs import PairRuns
from lightning_modules.pairwise_attention import PAIRWISE
from lightning_modules.varlen import VARLEN

log = logging.getLogger(__name__)

OURS = (VARLEN, FLEX, PAIRWISE)  # the implementations that take the runs of one row
# What `attention: auto` tries on CUDA, the fastest first. None has run on a GPU yet: the first run there decides
# the order.
CUDA_ORDER = (VARLEN, FLEX, PAIRWISE)


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


def dense_mask_bytes(attention: str, config: Any) -> int:
    """Return what all masks of a packed row (see `masks`) take for each two of its tokens: 0 for our attentions."""
    kinds = len(set(getattr(config, "layer_types", None) or [""]))
    return {"sdpa": 1, "eager": 4}.get(attention, 0) * kinds


def attentions(model: Any, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those of our own that this model may take on this device, in the order in which they are wanted."""
    if not model._supports_attention_backend:
        return []
    if device.type != "cuda":
        return [PAIRWISE]
    if lack := varlen.lacking(model.config, dtype):
        log.info("attention %s is not tried: %s", VARLEN, lack)
    return [name for name in CUDA_ORDER if name != VARLEN or lack is None]


def model_inputs(rows: PackedRows, config: Any) -> dict[str, Any]:
    """What a Hugging Face decoder with this `config` takes to score `rows`: every response sees its own pair only.

    Made once for each kind of attention and kept with the rows: layers, policy and reference share it.
    """
    implementation = config._attn_implementation
    if implementation in OURS:
        return rows.remember(implementation, lambda: one_row(rows, *ROW_OF.get(implementation, (1, 1))))
    return {"input_ids": rows.input_ids, "position_ids": rows.position_ids, **masks(rows, config)}


ROW_OF = {FLEX: (BLOCK, LEAST)}  # by implementation, what the tokens of a row are a multiple of, and their least


def one_row(rows: PackedRows, multiple: int, least: int) -> dict[str, Any]:
    """Tokens and positions as one row, padded at its end to a multiple of so many tokens, and its runs."""
    tokens = rows.input_ids.numel()
    padding = max(least, -(-tokens // multiple) * multiple) - tokens
    flat = {name: F.pad(getattr(rows, name).reshape(1, -1), (0, padding)) for name in ("input_ids", "position_ids")}
    runs = [*rows.runs, *([PairRun(0, (padding,))] if padding else [])]
    return flat | {"pair_runs": PairRuns(runs)}


def masks(rows: PackedRows, config: Any) -> dict[str, Any]:
    """The mask of `rows` for an attention of transformers.

    `separate` rows are plain right-padded rows: a two-dimensional mask, and the model does the rest. For a packed
    row transformers leaves out the model's own sliding window, so it is put in here. Eager attention adds whatever
    mask it is given: a boolean one would let every token see every other.
    """
    if rows.layout == "separate":
        return {"attention_mask": (rows.group >= 0).long()}
    build: Callable[..., Tensor] = additive_mask if config._attn_implementation == "eager" else dense_mask

    def mask(window: int | None = None) -> Tensor:
        return rows.remember((build.__name__, window), lambda: build(rows, window))

    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return {"attention_mask": mask()}
    if getattr(config, "layer_types", None):
        return {"attention_mask": {"full_attention": mask(), "sliding_attention": mask(window)}}
    return {"attention_mask": mask(window)}
