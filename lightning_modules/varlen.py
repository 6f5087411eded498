"""FlashAttention over the pieces of one row, without mask or compiler, for bfloat16 and float16 on CUDA.

The keys of a piece (see `pairwise_attention`) that shares a prompt start with a copy of the prompt.
`torch.nn.attention.varlen` aligns causal order at the ends of queries and keys, so a response sees all the prompt.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from app.method.batch import on_device
from lightning_modules.pairwise_attention import Options, PairRuns, one_dtype, register

VARLEN = "varlen"  # its name in transformers
DTYPES = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256  # FlashAttention's kernels take widths up to this that are multiples of 8


def key_pieces(runs: PairRuns, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Return indices [K] int64 of the keys of every piece, and the bounds of the pieces for `varlen_attn`.

    The bounds are offsets [pieces + 1] int32 of queries and of keys, and the longest of each as numbers, because
    the host would wait for a tensor.
    """
    pieces = np.array(runs.pieces)
    queries, lengths = pieces[:, 1], pieces[:, 1] + pieces[:, 3]
    keys = [np.r_[prompt : prompt + shared, start : start + tokens] for start, tokens, prompt, shared in pieces]
    offsets = (np.cumsum([0, *sizes], dtype=np.int32) for sizes in (queries, lengths))
    gathered, ends, key_ends = (
        on_device(torch.from_numpy(each), device) for each in (np.concatenate(keys), *offsets)
    )
    return gathered, ends, key_ends, int(queries.max()), int(lengths.max())


def lacking(config: Any, dtype: torch.dtype) -> str | None:
    """Return why this attention cannot run a model of this `config` in `dtype`, or None if it may."""
    if not {"window_size", "enable_gqa", "scale"} <= signature(varlen_attn).parameters.keys():
        return f"torch {torch.__version__} does not offer it"
    if dtype not in DTYPES:
        return f"it does not compute in {dtype}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it has no softcap"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if width % 8 == 0 and width <= WIDEST_HEAD else f"it has no heads of {width}"


def attend(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Compute FlashAttention; see `Attend`."""
    keys, *bounds = runs.remember(VARLEN, lambda: key_pieces(runs, query.device))
    # [T, heads, d]
    q, k, v = (states[0].transpose(0, 1) for states in one_dtype(query, key, value))
    if q.dtype not in DTYPES:
        raise ValueError(f"attention {VARLEN} does not compute in {q.dtype}")
    out = varlen_attn(
        q,
        k.index_select(0, keys),
        v.index_select(0, keys),
        *bounds,
        scale=options.scale,
        # (keys before the query, keys after): a window of W tokens includes the query itself
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


register(VARLEN, attend)
