"""Attention masks and model inputs for packed rows, where a response attends only to its own prompt and itself."""

from __future__ import annotations

import logging
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from app.method.batch import PackedRows, PairRun
from lightning_modules.flex import BLOCK, FLEX, attend_flex
from lightning_modules.pairwise_attention import PAIRWISE, VARLEN, Options, PairRuns, attend_pairwise, attend_varlen
from lightning_modules.private import attention_of, takes_attentions

log = logging.getLogger(__name__)

# This project's implementations, which take the runs of one row and no mask, in the order in which
# `attention: auto` tries them on CUDA: expected fastest first, not yet measured on a GPU.
OURS = {VARLEN: attend_varlen, FLEX: attend_flex, PAIRWISE: attend_pairwise}


@torch.compiler.disable  # compiled layers call it uncompiled; FlexAttention is compiled separately
def implementation(
    name: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return the output [1, T, heads, d] and no weights, as transformers calls an attention.

    Raises ValueError for unsupported options, so that the start-up check tries another attention.
    """
    if options.get("pair_runs") is None:
        raise ValueError("this model does not hand the layout of the rows to its attention")
    for unknown in ("s_aux", "position_bias", "softcap"):
        if options.get(unknown) is not None and (name, unknown) != (FLEX, "softcap"):
            raise ValueError(f"attention {name} has no {unknown}")
    chosen = Options(options.get("sliding_window"), options.get("scaling"), options.get("softcap"))
    return OURS[name](query, key, value, options["pair_runs"], chosen).transpose(1, 2), None


for name in OURS:
    AttentionInterface.register(name, partial(implementation, name))


def dense_mask(rows: PackedRows, window: int | None = None, added: bool = False) -> Tensor:
    """Return a boolean mask [R, 1, T, T], True where the query (second last axis) may attend to the key (last).

    Padding attends to padding, so no row of the softmax is empty. `window` counts positions within the pair,
    like sliding-window attention on a plain row. A mask to be `added` to the scores is 0 there, else very negative.
    """
    width = rows.input_ids.shape[1]
    mask = torch.ones(width, width, dtype=torch.bool, device=rows.group.device).tril()
    mask = mask & (rows.group[:, :, None] == rows.group[:, None, :])
    mask &= (rows.part[:, None, :] == 0) | (rows.part[:, :, None] == rows.part[:, None, :])
    if window is not None:
        mask &= rows.position_ids[:, :, None] - rows.position_ids[:, None, :] < window
    if added:
        zeros = torch.zeros(mask.shape, device=mask.device)
        mask = zeros.masked_fill(~mask, torch.finfo(zeros.dtype).min)
    return mask[:, None]


def dense_mask_bytes(attention: str, config: Any) -> int:
    """Return the bytes per (query, key) entry of all masks of a packed row (see `masks`); 0 for `OURS`."""
    kinds = len(set(getattr(config, "layer_types", None) or [""]))
    return {"sdpa": 1, "eager": 4}.get(attention, 0) * kinds


def lacking(config: Any, dtype: torch.dtype) -> str | None:
    """Return why `varlen` cannot run a model of this `config` in `dtype`, or None if it may.

    FlashAttention's kernels take heads of up to 256 numbers, in multiples of 8.
    """
    if not {"window_size", "enable_gqa", "scale"} <= signature(varlen_attn).parameters.keys():
        return f"torch {torch.__version__} does not offer it"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not compute in {dtype}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it has no softcap"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if width % 8 == 0 and width <= 256 else f"it has no heads of {width}"


def attentions(model: Any, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the attentions of `OURS` that this model may use on this device, in order of preference."""
    if not takes_attentions(model):
        return []
    if device.type != "cuda":
        return [PAIRWISE]
    if lack := lacking(model.config, dtype):
        log.info("attention %s is not tried: %s", VARLEN, lack)
    return [name for name in OURS if name != VARLEN or lack is None]


def model_inputs(rows: PackedRows, config: Any) -> dict[str, Any]:
    """Return the keyword arguments with which a Hugging Face decoder of this `config` scores `rows`.

    They are built once per kind of attention and kept with the rows; layers, policy and reference share them.
    """
    implementation = attention_of(config)
    if implementation in OURS:
        multiple = BLOCK if implementation == FLEX else 1
        return rows.remember(implementation, lambda: one_row(rows, multiple))
    return {"input_ids": rows.input_ids, "position_ids": rows.position_ids, **masks(rows, config)}


def one_row(rows: PackedRows, multiple: int) -> dict[str, Any]:
    """Return tokens and positions as one row with its runs, padded at the end to two or more times `multiple`."""
    tokens = rows.input_ids.numel()
    padding = max(2, -(-tokens // multiple)) * multiple - tokens
    flat = {name: F.pad(getattr(rows, name).reshape(1, -1), (0, padding)) for name in ("input_ids", "position_ids")}
    runs = [*rows.runs, *([PairRun(0, (padding,))] if padding else [])]
    return flat | {"pair_runs": PairRuns(runs)}


def masks(rows: PackedRows, config: Any) -> dict[str, Any]:
    """Return the mask arguments of `rows` for an attention of transformers.

    `separate` rows are plain right-padded rows and need only a two-dimensional mask. With a four-dimensional mask
    transformers does not apply the model's sliding window, so the mask includes it. Eager attention adds the mask
    to the scores, where a boolean one would let every token see every other.
    """
    if rows.layout == "separate":
        return {"attention_mask": (rows.group >= 0).long()}
    added = attention_of(config) == "eager"

    def mask(window: int | None = None) -> Tensor:
        return rows.remember((dense_mask, added, window), lambda: dense_mask(rows, window, added))

    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return {"attention_mask": mask()}
    if getattr(config, "layer_types", None):
        return {"attention_mask": {"full_attention": mask(), "sliding_attention": mask(window)}}
    return {"attention_mask": mask(window)}
