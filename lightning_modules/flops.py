"""Model FLOPs utilisation (MFU): the operations that a step cannot avoid, and the peak rate of the device."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Dense TFLOP/s of bfloat16 products with float32 sums, by the driver's name of the GPU. Most datasheets print twice
# as much, with sparsity, as does lightning.fabric.utilities.throughput for H200 and H100 NVL. Compared with public
# second-hand tables, not datasheets: all agree, GeForce 5090 and 3090 after halving figures for float16 sums.
DENSE_BFLOAT16 = (
    # datasheets DGX B200 (72 PFLOP/s in FP8 on 8 GPUs, sparse; half of it in bfloat16), GB200 NVL72 (360 on 72)
    {"NVIDIA B200": 2250.0, "NVIDIA GB200": 2500.0}
    # datasheets GH200, H200 and H100: SXM 1979, NVL 1671, PCIe 1513 sparse
    | dict.fromkeys(("NVIDIA GH200 480GB", "NVIDIA H200", "NVIDIA H100 80GB HBM3"), 989.5)
    | {"NVIDIA H200 NVL": 835.5, "NVIDIA H100 NVL": 835.5, "NVIDIA H100 PCIe": 756.5}
    | {f"NVIDIA A100{kind}": 312.0 for kind in ("-SXM4-40GB", "-SXM4-80GB", "-PCIE-40GB", " 80GB PCIe")}
    # datasheets A40, A30, A10; L40S, L40, and L4: 242 sparse
    | {"NVIDIA A40": 149.7, "NVIDIA A30": 165.0, "NVIDIA A10": 125.0}
    | {"NVIDIA L40S": 362.05, "NVIDIA L40": 181.05, "NVIDIA L4": 121.0}
    # whitepapers "RTX Blackwell", "Ada GPU Architecture" and "GA102"
    | {f"NVIDIA GeForce RTX {kind}": peak for kind, peak in (("5090", 209.5), ("4090", 165.2), ("3090", 71.0))}
)


def numbers(weight: Tensor) -> int:
    """Return how many numbers a weight has, of which two share a byte in 4 bits."""
    quantised = getattr(weight, "quant_state", None)
    return weight.numel() if quantised is None else math.prod(quantised.shape)


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(map(numbers, model.parameters()))


def forward_operations(model: Any, tokens: int, response_tokens: int) -> float:
    """Return a lower bound of a forward pass's FLOPs: layers for every token, the head for response tokens."""
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    layers = sum(numbers(p) for p in model.parameters() if p.ndim > 1 and p is not head and p is not embeddings)
    return 2.0 * (layers * tokens + head.numel() * response_tokens)


def step_operations(policy: Any, reference: Any, tokens: int, response_tokens: int, kept_fraction: float) -> float:
    """Return the FLOPs of a step: a forward pass of policy and `reference`, two more of the policy for kept pairs.

    With adapters this is too high, because frozen weights have no gradient.
    """
    fixed = 0.0 if reference is None else forward_operations(reference, tokens, response_tokens)
    return fixed + forward_operations(policy, tokens, response_tokens) * (1 + 2 * kept_fraction)


@cache  # so that an unknown GPU is logged once
def peak_operations(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a known GPU in `dtype`; None for any other device or dtype."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if dtype == torch.bfloat16 and name in DENSE_BFLOAT16:
        return 1e12 * DENSE_BFLOAT16[name]
    log.info("no train/mfu: the peak of %s in %s is not in lightning_modules/flops.py", name, dtype)
    return None
