"""The contract of `torch.nn.attention.varlen.varlen_attn` (torch 2.13), in plain operations."""

from __future__ import annotations

import torch
from cuda_stand_in import CudaTensor
from torch import Tensor


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`query` [T, heads, d], `key` and `value` [K, key heads, d]; offsets [N + 1] int32; the longest as numbers."""
    assert type(max_q) is int
    assert type(max_k) is int
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype
    assert query.device == key.device == cu_seq_q.device == cu_seq_k.device
    # a kernel reads them on the device: on the stand-in this is no wait
    ends = [
        (offsets.on_host if isinstance(offsets, CudaTensor) else offsets).tolist()
        for offsets in (cu_seq_q, cu_seq_k)
    ]
    assert [each[-1] for each in ends] == [len(query), len(key)]
    if not enable_gqa:
        assert query.shape[1] == key.shape[1]
    share = query.shape[1] // key.shape[1]
    left, right = window_size
    out = []
    for number in range(len(ends[0]) - 1):
        q = query[ends[0][number] : ends[0][number + 1]].float()
        k, v = (s[ends[1][number] : ends[1][number + 1]].float() for s in (key, value))
        assert len(q) <= max_q
        assert len(k) <= max_k
        k, v = (states.repeat_interleave(share, 1) for states in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        # the last query stands at the last key
        one = torch.ones_like(scores[0])
        ahead = one.cumsum(1) - one.cumsum(0) - (len(k) - len(q))
        hidden = (ahead > right) & (right >= 0) if right >= 0 else ahead > len(k)
        if left >= 0:
            hidden = hidden | (ahead < -left)
        weights = scores.masked_fill(hidden, -1e30).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(out).to(query.dtype)
