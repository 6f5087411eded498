"""FlexAttention over one row of pairs, which on CUDA skips blocks of tokens that do not attend to each other.

Transformers' wrapper compiles a graph per number of rows, length and mask; past the compiler's limit it runs
uncompiled and holds all scores. Here one graph serves: one row of whole blocks, the window in the mask's bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from app.method.batch import PairRuns, on_device
from lightning_modules.private import mark_dynamic

FLEX = "flex"  # its name in transformers
BLOCK = 128  # tokens; the block of FlexAttention's masks. A row of a single one would compile a second graph


class Options(NamedTuple):
    """The options of a layer's attention."""

    window: int | None  # keys that a query sees, itself included, counted within the pair
    scale: float | None
    softcap: float | None


def visible(runs: PairRuns, window: int | None) -> np.ndarray:
    """Return the bounds `own`, `first` and `end` of the keys that each query sees, [3, T] int32.

    Query q sees the keys own[q] … q of its own piece and the keys first[q] … end[q] − 1 of a prompt that its piece
    shares. A window of W tokens, counted within the pair, raises `own` and `first`.
    """
    pieces = np.array(runs.pieces)
    start, _, first, shared = np.repeat(pieces, pieces[:, 1], axis=0).T
    own, end = start, first + shared
    if window is not None:
        query = np.arange(len(own))
        own = np.maximum(start, query - window + 1)
        # the position of the token in its pair is shared + query − start
        first = np.minimum(end, np.maximum(first, end + query - start - window + 1))
    return np.stack([own, first, end]).astype(np.int32)


def block_tensors(runs: PairRuns, window: int | None, device: torch.device) -> list[Tensor]:
    """Return the block mask of a row of n whole blocks as int32 tensors, computed on the host without a T×T array.

    They are `BlockMask`'s counts [1, 1, n] and indices [1, 1, n, n] of the key blocks that a query block sees in
    part and as a whole, the same of the query blocks per key block, and the bounds [T] of `visible`.
    """
    own, first, end = bounds = visible(runs, window)
    query = np.arange(len(own))
    blocks = len(own) // BLOCK
    # Pairs (query, key) that see each other, per query block, as differences between a key block and the next: the
    # keys before a bound fill whole blocks, which cancel as the signs do, and the rest of one more.
    steps = np.zeros((blocks, blocks + 2), np.int64)
    for bound, sign in ((query + 1, 1), (own, -1), (end, 1), (first, -1)):
        block, rest = np.divmod(bound, BLOCK)
        np.add.at(steps, (query // BLOCK, block), sign * (rest - BLOCK))
        np.add.at(steps, (query // BLOCK, block + 1), -sign * rest)
    seen = steps.cumsum(1)[:, :-2]
    full = seen == BLOCK * BLOCK
    partial = (seen > 0) & ~full
    arrays: list[np.ndarray] = []
    for chosen in (partial, full, partial.T, full.T):
        columns = np.argsort(~chosen, axis=-1, kind="stable")  # of True first
        arrays += [chosen.sum(-1)[None, None], columns[None, None]]
    host = (torch.from_numpy(np.ascontiguousarray(each, np.int32)) for each in (*arrays, *bounds))
    return [on_device(each, device) for each in host]


def block_mask(tensors: list[Tensor], tokens: int) -> BlockMask:
    own, first, end = tensors[8:]

    def allowed(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= own[q]) & (k <= q)) | ((k >= first[q]) & (k < end[q]))

    return BlockMask((tokens, tokens), *tensors[:8], BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=allowed)  # type: ignore


def mask_bytes(tokens: int) -> int:
    """Return the bytes of the block mask of a row of `tokens` tokens: block counts and indices, and the bounds."""
    blocks = max(2, -(-tokens // BLOCK))
    return 4 * (4 * blocks * (blocks + 1) + 3 * blocks * BLOCK)


def packed_flex(
    query: Tensor, key: Tensor, value: Tensor, blocks: list[Tensor], scale: float | None, softcap: float | None
) -> Tensor:
    """Return FlexAttention's output for one row; `query`, `key` and `value` have one dtype."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    mask, grouped = block_mask(blocks, query.shape[2]), query.shape[1] != key.shape[1]
    score_mod = None if softcap is None else capped
    out: Any = flex_attention(query, key, value, score_mod, mask, scale=scale, enable_gqa=grouped)
    return out


# One graph, which raises past the compiler's limit. `attend_flex` marks the dimensions that follow the row's length
# as dynamic; `dynamic=True` would also make scale and soft cap dynamic, which FlexAttention refuses.
compiled_flex: Callable[..., Tensor] = torch.compile(packed_flex, fullgraph=True)


def attend_flex(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Return the same as `attend_pairwise` by FlexAttention."""
    window, scale, softcap = options
    blocks = runs.remember((FLEX, window), lambda: block_tensors(runs, window, query.device))
    for tensor in (query, key, value):  # the dimensions that follow the row's length in [1, heads, T, d]
        mark_dynamic(tensor, [2])
    for tensor in blocks:  # in [T], [1, 1, n], [1, 1, n, n]
        mark_dynamic(tensor, {1: [0], 3: [2], 4: [2, 3]}[tensor.ndim])
    return compiled_flex(query, key, value, blocks, scale, softcap)
