"""How much of the device the step uses: operations that it cannot avoid, against what the device can do."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops


def forward_operations(model: Any, tokens: int, response_tokens: int) -> float:
    """Floating-point operations of one forward pass: matrices of the layers on every unique token, and of the head
    on the response tokens. Attention and everything element by element are left out, so this is a lower bound.
    """
    head = model.get_output_embeddings().weight
    embeddings = model.get_input_embeddings().weight
    counted = {id(head), id(embeddings)}
    layers = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in counted)
    return 2.0 * (layers * tokens + head.numel() * response_tokens)


def step_operations(
    model: Any, tokens: int, response_tokens: int, kept_fraction: float, online_reference: bool
) -> float:
    """Those of one step of preference optimisation: a forward pass of the policy on all pairs, and of an online
    reference; a backward pass, which takes two, on the kept ones (with adapters less: weights that stay have no
    gradient).
    """
    return forward_operations(model, tokens, response_tokens) * (1 + online_reference + 2 * kept_fraction)


def peak_operations(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a known GPU does at most per second in `dtype`; None for any other device."""
    if device.type != "cuda":
        return None
    try:
        known = get_available_flops(device, dtype)
    except ValueError:  # Lightning knows the GPU, but not in this type
        return None
    return None if known is None else float(known)
