"""FlexAttention over one row of pairs: on CUDA, blocks of tokens that see nothing of each other cost nothing.

Transformers wraps FlexAttention as well. Its graphs multiply by the number of rows, by rows up to 128 tokens and by
mask function; past the compiler's limit FlexAttention runs uncompiled, and holds the scores of the whole row. Here
there is one row whose length is a multiple of the block, and one mask function: a window is part of its bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from app.method.batch import PairRun, on_device
from lightning_modules.pair_runs import PairRuns, one_dtype, register

FLEX = "flex"  # the name under which transformers knows it
BLOCK = 128  # tokens; the block of FlexAttention's masks
LEAST = 2 * BLOCK  # tokens of a row: a single block would be a graph of its own


def visible(runs: Sequence[PairRun], window: int | None) -> np.ndarray:
    """Which keys each query sees, [3, T] int32: `own`, `first`, `end`.

    Query q sees the keys own[q] … q, of its own part of the pair, and first[q] … end[q] − 1, of its prompt. A
    window of W tokens, counted in the pair as on a plain row, moves `own` and `first` up.
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
        # the token stands at end − first + query − begins in its pair
        first = np.minimum(end, np.maximum(first, end + query - begins - window + 1))
    return np.stack([own, first, end]).astype(np.int32)


def seen_per_block(bounds: np.ndarray) -> np.ndarray:
    """How many pairs of tokens see each other in each block, [n, n] by query and key block; no T×T array."""
    own, first, end = bounds
    tokens = len(own)
    blocks = tokens // BLOCK
    query_block = np.arange(tokens) // BLOCK

    def keys_before(stop: np.ndarray) -> np.ndarray:
        """Pairs of a query and a key before the query's `stop`, by block."""
        block, rest = np.divmod(stop, BLOCK)
        cell = query_block * (blocks + 1) + block
        shape = (blocks, blocks + 1)
        ends = np.bincount(cell, minlength=blocks * (blocks + 1)).reshape(shape)
        rests = np.bincount(cell, rest, minlength=blocks * (blocks + 1)).reshape(shape)
        beyond = ends[:, ::-1].cumsum(1)[:, ::-1]
        return rests[:, :-1].astype(np.int64) + BLOCK * beyond[:, 1:]

    return keys_before(np.arange(1, tokens + 1)) - keys_before(own) + keys_before(end) - keys_before(first)


class Blocks(NamedTuple):
    """The block mask of one row as tensors, int32: blocks of keys by query, of queries by key, and the bounds."""

    kv_num_blocks: Tensor  # [1, 1, n], of blocks of which a part is seen
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
        """The mask of one row of whole blocks, made on the host from its runs, without a T×T array."""
        bounds = visible(runs, window)
        seen = seen_per_block(bounds)
        full = seen == BLOCK * BLOCK
        partial = (seen > 0) & ~full
        arrays = [each for chosen in (partial, full, partial.T, full.T) for each in ordered(chosen)]
        return cls(
            *(on_device(torch.from_numpy(np.ascontiguousarray(each)), device) for each in (*arrays, *bounds))
        )

    def mask(self, tokens: int) -> BlockMask:
        """As FlexAttention takes it."""
        own, first, end = self.own, self.first, self.end

        def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            in_part = (key >= own[query]) & (key <= query)
            return in_part | ((key >= first[query]) & (key < end[query]))

        return BlockMask((tokens, tokens), *self[:8], BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=allowed)


def ordered(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks of each row of `chosen` [n, n] are, [1, 1, n], and their columns first, [1, 1, n, n]."""
    indices = np.argsort(~chosen, axis=-1, kind="stable")
    return chosen.sum(-1, dtype=np.int32)[None, None], indices.astype(np.int32)[None, None]


def mask_bytes(tokens: int) -> int:
    """Bytes of the block mask of a row: indices of partial and full blocks, by query and by key, and the bounds."""
    blocks = -(-max(tokens, LEAST) // BLOCK)
    return 4 * (4 * blocks * (blocks + 1) + 3 * blocks * BLOCK)


def packed_flex(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float | None, softcap: float | None
) -> Tensor:
    """FlexAttention of one row: `query` [1, heads, T, d], `key` and `value` [1, key heads, T, d], of one dtype."""

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


def compile_flex(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """`packed_flex` compiled, as one graph: past the compiler's limit it raises.

    `attend` marks what is as long as the row, so that one graph serves every length. `dynamic=True` would take
    scale and soft cap for variables as well, which FlexAttention refuses.
    """
    return torch.compile(packed_flex, fullgraph=True, backend=backend)


compiled_flex = compile_flex()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: PairRuns,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """See `pair_runs.Attend`."""
    blocks: Blocks = runs.made((FLEX, window), lambda: Blocks.of(runs.runs, window, query.device))
    states = one_dtype(query, key, value)
    for tensor in (*states, *blocks):
        # [T], [1, 1, n], [1, 1, n, n], [1, heads, T, d]: what follows the length of the row
        long = {1: (0,), 3: (2,), 4: (2,) if tensor.is_floating_point() else (2, 3)}[tensor.ndim]
        torch._dynamo.maybe_mark_dynamic(tensor, list(long))
    return compiled_flex(*states, blocks, scale, softcap)


register(FLEX, attend)
