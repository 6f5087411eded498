"""What a step measures: log-probabilities of pairs over all ranks, perturbed gaps, KL, and its FLOPs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from app.method.batch import OptimizerBatch, PackedRows, on_device
from app.method.dynamic_beta import perturbed_logits
from app.method.pair_loss import PairLogps, token_kl
from lightning_modules.lora import without_adapters
from lightning_modules.scorer import ResponseScorer, response_logps, response_sums, response_tokens, token_logps

log = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
CHUNK_TOKENS = 512  # response tokens whose logits [chunk, V] of both models are in memory at a time
# logits [n, V] of the policy, of the reference, targets [n] → K numbers per response token, [K, n]
Comparison = Callable[[Tensor, Tensor, Tensor], Tensor]


class Ranks:
    """The processes of a run, which the trainer's strategy must have set up."""

    def __init__(self, trainer: Trainer):
        sampling = trainer.distributed_sampler_kwargs
        self.strategy = trainer.strategy
        self.device = trainer.strategy.root_device
        self.size = trainer.world_size
        self.number = trainer.global_rank
        # the shares of a batch: one per rank, or per tensor-parallel group, whose ranks work on the same pairs
        self.shares = 1 if sampling is None else int(sampling["num_replicas"])

    def reduce(self, value: Tensor, how: str) -> Tensor:
        """Return `value` reduced over all ranks (`sum`, `mean` or `max`), on the CPU; a sum counts a share once."""
        if self.size == 1:
            return value.cpu()
        if how == "sum" and self.number % (self.size // self.shares):
            value = torch.zeros_like(value)  # the first rank of the tensor-parallel group adds it
        # a copy, because the strategy reduces in place
        return self.strategy.reduce(value.to(self.device, copy=True), reduce_op=how).cpu()

    def match(self, rows: list[PackedRows]) -> list[PackedRows]:
        """Return `rows` on this rank's device, with empty ones so that all ranks have as many."""
        most = int(self.reduce(torch.tensor(len(rows)), "max"))
        return [each.to(self.device) for each in (*rows, *(PackedRows.empty() for _ in range(most - len(rows))))]


@dataclass
class PairMeasurer:
    """The policy, its reference and the ranks; it is no module, so checkpoints do not hold the reference."""

    policy: ResponseScorer  # the model that is trained
    ranks: Ranks
    # the model that computes the reference's values for every batch; the policy itself, if without its adapters
    reference: ResponseScorer | None = None
    # instead, the reference's log-probabilities [n, 2] of the pairs with the keys [n]
    stored: Callable[[np.ndarray], Tensor] | None = None

    @property
    def scorers(self) -> tuple[ResponseScorer, ...]:
        return (self.policy,) if self.reference in (None, self.policy) else (self.policy, self.reference)

    def as_reference(self) -> AbstractContextManager[None]:
        """Disable the adapters within the block if the policy itself is the reference."""
        return without_adapters(self.policy.model) if self.reference is self.policy else nullcontext()

    def rows(self, batch: OptimizerBatch, pairs: Sequence[int] | None = None) -> list[PackedRows]:
        """Return the rows of `pairs` (indices into this rank's share; None: all), as many on every rank."""
        return self.ranks.match(self.policy.pack(batch, SIDES, pairs))

    def measure(self, batch: OptimizerBatch, micro_batches: Sequence[PackedRows]) -> tuple[PairLogps, PairLogps]:
        """Return the log-probabilities [B] of this rank's pairs, and those of all G pairs as `gather` returns them.

        Those of the policy keep their graph unless any rank has a pair in packed rows that is not finite.
        """
        logps = self.measure_rows(batch, micro_batches)
        global_logps = self.gather(logps, batch)
        if self.policy.layout == "packed" and not global_logps.finite.all():
            logps = self.measured_alone(batch, logps)
            global_logps = self.gather(logps, batch)
        return logps, global_logps

    def measure_rows(self, batch: OptimizerBatch, micro_batches: Sequence[PackedRows]) -> PairLogps:
        """Return the log-probabilities of the pairs in the rows; other pairs of the share get zeros."""
        share, device = len(batch.positions), self.ranks.device
        fixed: Sequence[Tensor | None] = (None, None)  # for a loss without a reference
        if self.stored is not None:
            fixed = on_device(self.stored(batch.pair_keys.numpy()), device).unbind(1)
        elif self.reference is not None:
            with torch.no_grad(), self.as_reference():  # before the policy, whose activations stay in memory
                fixed = response_logps(self.reference, micro_batches, share, 2, device).unbind(1)
        policy = response_logps(self.policy, micro_batches, share, 2, device).unbind(1)
        return PairLogps(*policy, *fixed, *response_tokens(micro_batches, share, 2, device).unbind(1))

    def gather(self, logps: PairLogps, batch: OptimizerBatch) -> PairLogps:
        """Return `logps` of all G pairs, detached, on the CPU, equal on every rank; one sum of O(G) joins them."""
        own = [column.detach().double() for column in vars(logps).values() if column is not None]
        table = torch.zeros(len(own), len(batch.pair_ids), dtype=torch.float64, device=self.ranks.device)
        table[:, on_device(batch.positions, self.ranks.device)] = torch.stack(own)
        columns = iter(self.ranks.reduce(table, "sum"))
        return logps.each(lambda _: next(columns))

    def measured_alone(self, batch: OptimizerBatch, logps: PairLogps) -> PairLogps:
        """Return `logps` [B], detached; all ranks score pairs that are not finite again, in separate rows."""
        # a masked key has the attention weight 0, and 0·NaN is NaN: one bad pair makes its whole packed row NaN
        spoilt = ~logps.finite
        suspects = torch.nonzero(spoilt).flatten().tolist()
        with torch.no_grad(), ExitStack() as attention:
            for scorer in self.scorers:
                attention.enter_context(scorer.as_loaded())
            rows = batch.micro_batches(SIDES, "separate", self.policy.balanced_row, suspects)
            again = self.measure_rows(batch, self.ranks.match(rows))
        return logps.detach().each(lambda first, alone: torch.where(spoilt, alone, first), again)


# --- what needs the logits of policy and reference together: gaps under perturbation (ε-DPO) and the KL ---------


def perturbed_gaps(
    measurer: PairMeasurer, batch: OptimizerBatch, eligible: Tensor, epsilons: Sequence[float]
) -> Tensor:
    """Return log π(y_w|x) − log π(y_l|x) under (1+ε)·logits_θ − ε·logits_ref, [len(epsilons), G] float64, CPU."""

    def perturbed(logits: Tensor, fixed: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([token_logps(perturbed_logits(logits, fixed, one), targets) for one in epsilons])

    table = response_table(measurer, batch, eligible, perturbed, len(epsilons))
    return table[..., 0] - table[..., 1]


def reference_kl(measurer: PairMeasurer, batch: OptimizerBatch, eligible: Tensor) -> Tensor:
    """Return KL(π‖π_ref) summed over the tokens of chosen and rejected responses, [2, G] float64 on the CPU."""
    # TDPO's sequential KL (arXiv 2404.11999) in the direction of RLHF's penalty
    return response_table(measurer, batch, eligible, lambda ours, fixed, _: token_kl(ours, fixed)[None], 1)[0].T


@torch.no_grad()
def response_table(
    measurer: PairMeasurer, batch: OptimizerBatch, eligible: Tensor, compare: Comparison, size: int
) -> Tensor:
    """Return `compare` (K = `size`) summed over responses, [K, G, 2] float64, CPU; NaN unless `eligible` [G].

    All ranks must call it at once.
    """
    policy, reference, ranks = measurer.policy, measurer.reference, measurer.ranks
    assert reference is not None
    here = torch.nonzero(eligible[batch.positions]).flatten().tolist()
    table = torch.zeros(size, len(batch.pair_ids), 2, dtype=torch.float64, device=ranks.device)
    positions = on_device(batch.positions, ranks.device)
    for rows in measurer.rows(batch, here):
        hidden = [policy(rows, hidden_only=True)]
        with measurer.as_reference():
            hidden.append(reference(rows, hidden_only=True))
        for scorer in measurer.scorers:
            if isinstance(scorer, FSDPModule):
                scorer.unshard()  # embeddings and head, until `leave_gathered`
        chunks = (part.split(CHUNK_TOKENS) for part in (*hidden, rows.target_ids))
        per_token = [
            compare(policy.logits(ours), reference.logits(fixed), targets)
            for ours, fixed, targets in zip(*chunks, strict=True)
        ]
        sums = [response_sums(column, rows) for column in torch.cat(per_token, dim=1)]
        table[:, positions[rows.pairs]] = torch.stack(sums).view(size, -1, 2)
    return ranks.reduce(table, "sum").masked_fill(~eligible[:, None], torch.nan)


# Dense TFLOP/s of bfloat16 products with float32 sums, by the driver's name of the GPU. Most datasheets print twice
# as much, with sparsity, as does lightning.fabric.utilities.throughput for H200 and H100 NVL. Public second-hand
# tables agree with all, for GeForce 5090 and 3090 after halving figures for float16 sums.
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
    return sum(map(numbers, model.parameters()))


def forward_operations(model: Any, tokens: int, response_tokens: int) -> float:
    """Return a lower bound of a forward pass's FLOPs: layers for every token, the head for response tokens."""
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    layers = sum(numbers(p) for p in model.parameters() if p.ndim > 1 and p is not head and p is not embeddings)
    return 2.0 * (layers * tokens + head.numel() * response_tokens)


def step_operations(policy: Any, reference: Any, tokens: int, response_tokens: int, kept_fraction: float) -> float:
    """Return the FLOPs of a step: a forward pass of policy and `reference`, a backward pass for kept pairs."""
    # too high with adapters, because frozen weights have no gradient
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
    log.info("no train/mfu: the peak of %s in %s is not in lightning_modules/measuring.py", name, dtype)
    return None
