"""FlexAttention over one row of pairs, which on CUDA skips blocks of tokens that do not attend to each other.

Transformers also wraps FlexAttention, but compiles one graph per number of rows, for rows up to 128 tokens and per
mask function. Past the compiler's limit FlexAttention runs uncompiled and holds the scores of the whole row. This
module needs one graph: one row, its length a multiple of the block, and one mask function with the window in its
bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from app.method.batch import PairRun, on_device
from lightning_modules.pairwise_attention import Options, PairRuns, one_dtype, register
from lightning_modules.private import mark_dynamic

FLEX = "flex"  # its name in transformers
BLOCK = 128  # tokens; the block of FlexAttention's masks
LEAST = 2 * BLOCK  # least tokens of a row, because a row of one block would compile a second graph


def visible(runs: Sequence[PairRun], window: int | None) -> np.ndarray:
    """Return the bounds `own`, `first` and `end` of the keys that each query sees, [3, T] int32.

    Query q sees the keys own[q] … q of its own part of the pair and the keys first[q] … end[q] − 1 of its prompt.
    A window of W tokens, counted within the pair, raises `own` and `first`.
    """
    start = 0
    parts: list[tuple[int, int, int, int]] = []  # where a part begins, its tokens, where its prompt begins and ends
    for prompt, responses in runs:
        parts.append((start, prompt, start, start))
        begins = start + prompt
        for response in responses:
            parts.append((begins, response, start, start + prompt))
            begins += response
        start = begins
    columns = np.array(parts, dtype=np.int64)
    begins, _, first, end = np.repeat(columns, columns[:, 1], axis=0).T
    own = begins
    if window is not None:
        query = np.arange(start)
        own = np.maximum(begins, query - window + 1)
        # the position of the token in its pair is end − first + query − begins
        first = np.minimum(end, np.maximum(first, end + query - begins - window + 1))
    return np.stack([own, first, end]).astype(np.int32)


def seen_per_block(bounds: np.ndarray) -> np.ndarray:
    """Return the number of visible (query, key) pairs in each block, [n, n] by query and key block.

    Needs no T×T array.
    """
    own, first, end = bounds
    tokens = len(own)
    blocks = tokens // BLOCK
    query_block = np.arange(tokens) // BLOCK

    def keys_before(stop: np.ndarray) -> np.ndarray:
        """Return per block the number of (query, key) pairs with the key before the query's `stop`."""
        block, rest = np.divmod(stop, BLOCK)
        cell = query_block * (blocks + 1) + block
        shape = (blocks, blocks + 1)
        ends = np.bincount(cell, minlength=blocks * (blocks + 1)).reshape(shape)
        rests = np.bincount(cell, rest, minlength=blocks * (blocks + 1)).reshape(shape)
        beyond = ends[:, ::-1].cumsum(1)[:, ::-1]
        return rests[:, :-1].astype(np.int64) + BLOCK * beyond[:, 1:]

    return keys_before(np.arange(1, tokens + 1)) - keys_before(own) + keys_before(end) - keys_before(first)


class Blocks(NamedTuple):
    """The block mask of one row as int32 tensors: key blocks per query block, the reverse, and the bounds."""

    kv_num_blocks: Tensor  # [1, 1, n], counts blocks that are partly visible
    kv_indices: Tensor  # [1, 1, n, n]
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
    own: Tensor  # [T], see `visible`
    first: Tensor
    end: Tensor

    @classmethod
    def of(cls, runs: Sequence[PairRun], window: int | None, device: torch.device) -> Blocks:
        """Return the block mask of a row of whole blocks, computed on the host without a T×T array."""
        bounds = visible(runs, window)
        seen = seen_per_block(bounds)
        full = seen == BLOCK * BLOCK
        partial = (seen > 0) & ~full
        arrays = [each for chosen in (partial, full, partial.T, full.T) for each in ordered(chosen)]
        return cls(
            *(on_device(torch.from_numpy(np.ascontiguousarray(each)), device) for each in (*arrays, *bounds))
        )

    def mask(self, tokens: int) -> BlockMask:
        """Return the `BlockMask` for FlexAttention."""
        own, first, end = self.own, self.first, self.end

        def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_part = (key >= own[query]) & (key <= query)
            return in_part | ((key >= first[query]) & (key < end[query]))

        return BlockMask((tokens, tokens), *self[:8], BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=allowed)


def ordered(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return per row of `chosen` [n, n] the count of True [1, 1, n] and the columns, True first [1, 1, n, n]."""
    indices = np.argsort(~chosen, axis=-1, kind="stable")
    return chosen.sum(-1, dtype=np.int32)[None, None], indices.astype(np.int32)[None, None]


def mask_bytes(tokens: int) -> int:
    """Return the bytes of the block mask of a row of `tokens` tokens: block counts and indices, and the bounds."""
    blocks = -(-max(tokens, LEAST) // BLOCK)
    return 4 * (4 * blocks * (blocks + 1) + 3 * blocks * BLOCK)


def packed_flex(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float | None, softcap: float | None
) -> Tensor:
    """Return FlexAttention's output [1, heads, T, d] for one row.

    `query` is [1, heads, T, d], `key` and `value` are [1, key heads, T, d], all of one dtype.
    """

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out = flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=blocks.mask(query.shape[2]),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


# One graph, which raises past the compiler's limit. `attend` marks the dimensions that follow the row's length as
# dynamic, so that it serves every length. `dynamic=True` would also make scale and soft cap dynamic, which
# FlexAttention refuses.
compiled_flex: Callable[..., Tensor] = torch.compile(packed_flex, fullgraph=True)


def attend(query: Tensor, key: Tensor, value: Tensor, runs: PairRuns, options: Options) -> Tensor:
    """Compute FlexAttention; see `Attend`."""
    window, scale, softcap = options
    blocks: Blocks = runs.made((FLEX, window), lambda: Blocks.of(runs.runs, window, query.device))
    states = one_dtype(query, key, value)
    for tensor in (*states, *blocks):
        # dimensions that follow the row's length in [T], [1, 1, n], [1, 1, n, n], [1, heads, T, d]
        long = {1: (0,), 3: (2,), 4: (2,) if tensor.is_floating_point() else (2, 3)}[tensor.ndim]
        mark_dynamic(tensor, list(long))
    return compiled_flex(*states, blocks, scale, softcap)


register(FLEX, attend, softcaps=True)
