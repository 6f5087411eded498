"""FlashAttention over the pieces of one row, without mask or compiler, for bfloat16 and float16 on CUDA.

A piece is the prompt with its first response, or another response, whose keys then start with a copy of the prompt.
`torch.nn.attention.varlen` aligns causal order at the ends of queries and keys, so a response sees all the prompt.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from app.method.batch import on_device
from lightning_modules.pairwise_attention import Options, PairRuns, one_dtype, register

VARLEN = "varlen"  # its name in transformers
DTYPES = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256  # FlashAttention's kernels take widths up to this that are multiples of 8


class Pieces(NamedTuple):
    """The pieces of a row: `keys` [K] int64 gathers the keys; offsets [pieces + 1] int32 bound the pieces."""

    keys: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    longest_query: int  # an int, because a tensor would make the host wait or recompile
    longest_key: int

    @classmethod
    def of(cls, runs: PairRuns, device: torch.device) -> Pieces:
        keys: list[np.ndarray] = []
        queries: list[int] = []
        start = 0
        for prompt, responses in runs.runs:
            shared, start = np.arange(start, start + prompt), start + prompt
            for number, tokens in enumerate(responses):
                keys.append(np.concatenate([shared, np.arange(start, start + tokens)]))
                queries.append(tokens if number else prompt + tokens)
                start += tokens
        seen = [len(each) for each in keys]
        offsets = (np.cumsum([0, *lengths], dtype=np.int32) for lengths in (queries, seen))
        tensors = (on_device(torch.from_numpy(each), device) for each in (np.concatenate(keys), *offsets))
        return cls(*tensors, max(queries), max(seen))  # type: ignore[call-arg, arg-type]


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
    pieces: Pieces = runs.made(VARLEN, lambda: Pieces.of(runs, query.device))
    # [T, heads, d]
    q, k, v = (states[0].transpose(0, 1) for states in one_dtype(query, key, value))
    if q.dtype not in DTYPES:
        raise ValueError(f"attention {VARLEN} does not compute in {q.dtype}")
    out = varlen_attn(
        q,
        k.index_select(0, pieces.keys),
        v.index_select(0, pieces.keys),
        pieces.query_offsets,
        pieces.key_offsets,
        pieces.longest_query,
        pieces.longest_key,
        scale=options.scale,
        # (keys before the query, keys after): a window of W tokens includes the query itself
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


register(VARLEN, attend)
