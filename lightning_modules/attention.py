"""Attention over packed rows, where a response attends only to its own prompt and itself: inputs and kernels.

With a dense mask the cost of attention is quadratic in the row. Pair by pair it is the sum of the costs of the
pairs, so all pairs of a micro-batch can be in one row without padding.
"""

from __future__ import annotations

import logging
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from app.method.batch import PackedRows, PairRun, PairRuns, on_device
from lightning_modules.flex import BLOCK, FLEX, Options, attend_flex
from lightning_modules.private import takes_attentions

log = logging.getLogger(__name__)

PAIRWISE, VARLEN = "pairwise", "varlen"  # their names in transformers


# --- attention pair by pair, by SDPA (the default on CPUs) or by FlashAttention ----------------------------------


def piece_mask(runs: PairRuns, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
    """Return the additive mask [queries, keys] of the last `queries` of `keys` tokens; None if plain causal."""
    seen = keys if window is None else min(window, keys)
    if queries == keys == seen:
        return None

    def make() -> Tensor:
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
        hidden = (distance < 0) | (distance >= seen)
        return torch.zeros(queries, keys, dtype=like.dtype).masked_fill_(hidden, -torch.inf).to(like.device)

    return runs.remember((PAIRWISE, queries, keys, seen, like.dtype), make)


def attend_pairwise(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Return attention [1, heads, T, d] of `query` to `key` and `value` [1, key heads, T, d], by SDPA."""
    # split, because the gradient of a slice is as large as the whole tensor
    sizes = [piece.tokens for piece in runs.pieces]
    split = (states.split(sizes, dim=2) for states in (query, key, value))
    outputs: list[Tensor] = []
    whole: tuple[Tensor, ...] = ()  # keys and values of the piece that holds the prompt
    for piece, q, k, v in zip(runs.pieces, *split, strict=True):
        if piece.shared:
            k, v = (torch.cat([s[:, :, : piece.shared], own], 2) for s, own in zip(whole, (k, v), strict=True))
        else:
            whole = k, v
        mask = piece_mask(runs, q.shape[2], k.shape[2], options.window, q)
        how = {"is_causal": mask is None, "scale": options.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        outputs.append(F.scaled_dot_product_attention(q, k, v, mask, **how))
    return torch.cat(outputs, 2)


def key_pieces(runs: PairRuns, device: torch.device) -> tuple[Any, ...]:
    """Return indices [K] int64 of keys, offsets [pieces + 1] int32 of queries and keys, and the most in a piece."""
    pieces = np.array(runs.pieces)
    queries, lengths = pieces[:, 1], pieces[:, 1] + pieces[:, 3]
    keys = [np.r_[prompt : prompt + shared, start : start + tokens] for start, tokens, prompt, shared in pieces]
    offsets = (np.cumsum([0, *sizes], dtype=np.int32) for sizes in (queries, lengths))
    tensors = (on_device(torch.from_numpy(each), device) for each in (np.concatenate(keys), *offsets))
    return *tensors, int(queries.max()), int(lengths.max())


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Return the same by FlashAttention, which aligns queries and keys at their ends, so the prompt is seen."""
    keys, *bounds = runs.remember(VARLEN, lambda: key_pieces(runs, query.device))
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, heads, d]
    out: Any = varlen_attn(
        q,
        k.index_select(0, keys),
        v.index_select(0, keys),
        *bounds,
        scale=options.scale,
        # (keys before the query, keys after): a window of W tokens includes the query itself
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(0, 1)[None]


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of products with `weight`: the autocast dtype if autocast is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


# This project's implementations, which take the runs of one row and no mask. On CUDA `attention: auto` tries them
# in this order: expected fastest first, not yet measured.
OURS = {VARLEN: attend_varlen, FLEX: attend_flex, PAIRWISE: attend_pairwise}


@torch.compiler.disable  # compiled layers call it uncompiled; FlexAttention is compiled separately
def implementation(
    name: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Return the output [1, T, heads, d] and no weights. Raises ValueError for options that the attention lacks."""
    if options.get("pair_runs") is None:
        raise ValueError("this model does not hand the layout of the rows to its attention")
    for unknown in ("s_aux", "position_bias", "softcap"):
        if options.get(unknown) is not None and (name, unknown) != (FLEX, "softcap"):
            raise ValueError(f"attention {name} has no {unknown}")
    if name != PAIRWISE:  # rotary positions leave queries and keys in float32
        query, key, value = (states.to(compute_dtype(value)) for states in (query, key, value))
    chosen = Options(options.get("sliding_window"), options.get("scaling"), options.get("softcap"))
    return OURS[name](query, key, value, options["pair_runs"], chosen).transpose(1, 2).contiguous(), None


for name in OURS:
    AttentionInterface.register(name, partial(implementation, name))


def lacking(config: Any, dtype: torch.dtype) -> str | None:
    """Return why `varlen` cannot run this model; FlashAttention takes heads of 8, 16, … or 256 numbers."""
    if not {"window_size", "enable_gqa", "scale"} <= signature(varlen_attn).parameters.keys():
        return f"torch {torch.__version__} does not offer it"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it does not compute in {dtype}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it has no softcap"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if width % 8 == 0 and width <= 256 else f"it has no heads of {width}"


def attentions(model: Any, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return those of `OURS` that this model may use on this device, in order of preference."""
    if not takes_attentions(model):
        return []
    if device.type != "cuda":
        return [PAIRWISE]
    if lack := lacking(model.config.get_text_config(), dtype):
        log.info("attention %s is not tried: %s", VARLEN, lack)
    return [name for name in OURS if name != VARLEN or lack is None]


# --- the inputs of a model ---------------------------------------------------------------------------------------


def model_inputs(rows: PackedRows, attention: str, config: Any) -> dict[str, Any]:
    """Return a decoder's keyword arguments for `rows`, built once for policy and reference."""
    if attention in OURS:
        return rows.remember(attention, lambda: one_row(rows, BLOCK if attention == FLEX else 1))
    mask = masks(rows, attention, config)
    return {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "attention_mask": mask}


def one_row(rows: PackedRows, multiple: int) -> dict[str, Any]:
    """Return tokens and positions as one row with its runs, padded to two or more times `multiple` tokens."""
    tokens = rows.input_ids.numel()
    padding = max(2, -(-tokens // multiple)) * multiple - tokens
    flat = {name: F.pad(getattr(rows, name).reshape(1, -1), (0, padding)) for name in ("input_ids", "position_ids")}
    runs = [*rows.runs, *([PairRun(0, (padding,))] if padding else [])]
    return flat | {"pair_runs": PairRuns(runs)}


def masks(rows: PackedRows, attention: str, config: Any) -> Tensor | dict[str, Tensor]:
    """Return the mask of `rows` for an attention of transformers, or one per kind of layer."""
    if rows.layout == "separate":  # padded at the right
        return (rows.group >= 0).long()
    added = attention == "eager"  # to the scores

    def mask(window: int | None = None) -> Tensor:
        return rows.remember((dense_mask, added, window), lambda: dense_mask(rows, window, added))

    window = getattr(config, "sliding_window", None)  # which transformers does not apply to such a mask
    if window is None or not getattr(config, "use_sliding_window", True):
        return mask()
    if getattr(config, "layer_types", None):
        return {"full_attention": mask(), "sliding_attention": mask(window)}
    return mask(window)


def dense_mask(rows: PackedRows, window: int | None = None, added: bool = False) -> Tensor:
    """Return a mask [R, 1, T, T], True where the query (second last axis) may attend to the key (last).

    A mask to be `added` to the scores is 0 there, else very negative.
    """
    width = rows.input_ids.shape[1]
    mask = torch.ones(width, width, dtype=torch.bool, device=rows.group.device).tril()
    # padding attends to padding, so no row of the softmax is empty
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
