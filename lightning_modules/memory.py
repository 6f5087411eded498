"""Memory of a training step per device, computed from the shapes of a model for `beta-dpo plan`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.core.errors import refused
from lightning_modules.flex import mask_bytes
from lightning_modules.pretrained import linear_weights
from lightning_modules.private import FakeTensorMode, storage_id
from lightning_modules.scorer import NARROWEST_SLICE, SLICE_LOGITS
from lightning_modules.sharding import LOCAL, ShardedStrategy, keep_local_part, transformer_blocks

WEIGHT = 4  # bytes of a master weight, of a gradient and of each number of optimizer state: float32
# what a moment may hold beside the resident parts
HELD = ("gradients", "dequantised layer", "gathered weights", "gradients not yet reduced", "activations", "logits")
SHORT_ROW = 16  # tokens; short, so that the dense mask, which FlexAttention does not need, adds almost nothing


@dataclass(frozen=True)
class Activations:
    """The activation memory of a model, in bytes per token of a micro-batch."""

    all_blocks: float  # kept by all transformer blocks together
    largest_block: float
    outside: float  # embeddings, final norm
    block_input: float  # kept per block under gradient checkpointing; the head's input has the same size
    blocks: int


def activations(config: Any, dtype: torch.dtype, autocast: bool, split: int = 1) -> Activations:
    """Measure the decoder without its head on fake tensors, for one of `split` ranks that share every layer.

    Weights have `dtype` in the forward pass; with `autocast`, products are in bfloat16. Attention stores no scores.
    """
    config = config.get_text_config()
    with refused(f"plan: a model of type {config.model_type} cannot be measured without weights"):
        few, many = (_kept(config, dtype, autocast, split, rows) for rows in (1, 9))
    # the difference of two sizes cancels everything that does not grow with the number of tokens
    outside, *blocks = [(m - f) / (8 * SHORT_ROW) for m, f in zip(many, few, strict=True)]
    width = config.hidden_size * torch.empty((), dtype=dtype).element_size()
    return Activations(sum(blocks), max(blocks), outside, width, len(blocks))


def _kept(config: Any, dtype: torch.dtype, autocast: bool, split: int, rows: int) -> list[int]:
    """Return the bytes kept outside the blocks, then by each block; shared storage counts once."""
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        keep_local_part(model, split, LOCAL)
        blocks = transformer_blocks(model)
        counted = {storage_id(parameter) for parameter in model.parameters()}
        kept = [0] * (len(blocks) + 1)
        place = [0]

        def move_to(number: int, *_: Any) -> None:
            place[0] = number

        def count(tensor: Tensor) -> Tensor:
            if storage_id(tensor) not in counted:
                counted.add(storage_id(tensor))
                kept[place[0]] += tensor.untyped_storage().nbytes()
            return tensor

        for number, block in enumerate(blocks, 1):
            block.register_forward_pre_hook(partial(move_to, number))
            block.register_forward_hook(partial(move_to, 0))
        ids = torch.zeros(rows, SHORT_ROW, dtype=torch.int64)
        mask = torch.ones(rows, 1, SHORT_ROW, SHORT_ROW, dtype=torch.bool)
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            output = model.base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
        del output  # alive until here, so that no new storage reuses the address of a freed one
    return kept


class Parts(NamedTuple):
    """Numbers of parameters."""

    all: int
    block: int  # of the largest transformer block
    root: int  # outside the blocks: embeddings, head, final norm
    head: int

    @classmethod
    def of(cls, model: Any, trained: bool = False) -> Parts:
        """Count the parameters of `model`, or those that are `trained`."""

        def count(weights: Iterable[Tensor]) -> int:
            return sum(weight.numel() for weight in weights if weight.requires_grad or not trained)

        blocks = [count(block.parameters()) for block in transformer_blocks(model)]
        whole, head = count(model.parameters()), count(model.get_output_embeddings().parameters())
        return cls(whole, max(blocks), whole - sum(blocks), head)


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model, or under tensor parallelism of one rank's part of it."""

    weights: Parts
    trained: Parts
    vocabulary: int
    linear: int  # weights of linear layers, which a frozen model keeps in the autocast dtype
    stored: int  # bytes of all weights as they are kept
    copied: int  # weights of which autocast makes a copy
    dequantized: int  # of the largest quantised layer, which is dequantised for its products

    @classmethod
    def of(cls, model: Any, quantize: Mapping[str, Any] | None = None) -> Sizes:
        """Count the parameters of `model`; with `quantize`, linear layers as `quantized_size` says."""
        head, linear = model.get_output_embeddings().weight, linear_weights(model)
        frozen = {id(weight): weight.numel() for weight in linear if not weight.requires_grad}
        packed = {key: size for key, size in frozen.items() if quantize is not None and key != id(head)}
        whole = [weight for weight in model.parameters() if id(weight) not in packed]
        stored = sum(w.numel() * w.element_size() for w in whole) + sum(packed.values()) * quantized_size(quantize)
        rounded = (w for w in whole if w.requires_grad or (id(w) in frozen and w.element_size() == WEIGHT))
        return cls(
            weights=Parts.of(model),
            trained=Parts.of(model, trained=True),
            vocabulary=head.shape[0],
            linear=sum(weight.numel() for weight in linear),
            stored=int(stored),
            copied=sum(weight.numel() for weight in rounded),
            dequantized=max(packed.values(), default=0),
        )


def quantized_size(quantize: Mapping[str, Any] | None) -> float:
    """Return the bytes of a number in 8 or 4 bits."""
    if not quantize or not quantize.get("load_in_4bit"):
        return 1.0
    # a scale per 64 in float32, or in 8 bits with a float32 scale per 256 of these (QLoRA, arXiv 2305.14314, §3)
    return 0.5 + ((1 + 4 / 256) if quantize.get("bnb_4bit_use_double_quant") else 4) / 64


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes per device at each moment of a step that may be its peak, with the settings that affect them."""

    sizes: Sizes
    activations: Activations
    kind: Literal["single", "ddp", "sharded"]
    device: Literal["cpu", "cuda"]
    strategy: ShardedStrategy | None  # if `sharded`
    shards: int  # ranks that share one copy of the model
    compute_bytes: int  # bytes of a number in the forward pass
    autocast: bool
    reference: bool
    checkpointed: bool
    dense_mask: int  # bytes per (query, key) entry of the masks of a transformers attention
    optimizer_state: float  # numbers per parameter

    @property
    def resident(self) -> dict[str, int]:
        """Return the bytes held throughout the step."""
        sizes, shards = self.sizes, self.shards
        state = int(WEIGHT * sizes.trained.all // shards * self.optimizer_state)
        resident = {"parameters": sizes.stored // shards, "optimizer state": state}
        if self.reference and not (self.strategy and self.strategy.offload_reference):
            halved = sizes.weights.all if self.strategy else sizes.linear
            reference = self.compute_bytes * halved + WEIGHT * (sizes.weights.all - halved)
            resident["reference"] = (sizes.stored if sizes.dequantized else reference) // shards
        if self.autocast:
            resident["bfloat16 copies of autocast"] = 2 * sizes.copied
        return resident

    def moments(self, tokens: int) -> dict[str, dict[str, int]]:
        """Return the bytes held at each moment that may be the peak, with micro-batches of `tokens` tokens."""
        weights, trained, made = self.sizes.weights, self.sizes.trained, self.activations
        strategy, compute, on_cuda = self.strategy, self.compute_bytes, self.device == "cuda"
        share = WEIGHT * trained.all // self.shards
        gradients = share + (WEIGHT * trained.all if self.kind == "ddp" else 0)  # DDP adds its buckets
        root = blocks = 0  # gathered weights
        # gradients of the head, a block and the root before their reduction
        unreduced = WEIGHT * trained.head, 0, 0
        if strategy is not None:
            gradients += WEIGHT * trained.all * strategy.accumulate_whole_gradients
            root, block = compute * weights.root, compute * weights.block
            # the running block, the prefetched blocks, and the receive buffer of one block
            blocks = block * (2 + strategy.prefetch_blocks)
            if not strategy.reshard_after_forward:
                blocks = compute * (weights.all - weights.root) + block
            copied = compute + WEIGHT
            unreduced = compute * trained.head, copied * trained.block, copied * trained.root
        gathered = root + blocks
        both = gathered * (2 if self.reference and strategy is not None else 1)
        # in the worst case all tokens are in one row
        masks = self.dense_mask * tokens**2 or mask_bytes(tokens) * on_cuda
        # the peak is at the start of the backward pass or, with checkpoints, while a block is recomputed
        blocks_kept = made.blocks * made.block_input + made.largest_block if self.checkpointed else made.all_blocks
        kept = int((made.outside + made.block_input + blocks_kept) * tokens) + masks
        # with the gradients of the running block's activations
        running = kept + int(made.largest_block * tokens / 2)
        # the head's slice of logits and its gradient, all tokens being of responses
        slice_logits = max(SLICE_LOGITS[self.device], NARROWEST_SLICE * tokens)
        logits = min(slice_logits, tokens * self.sizes.vocabulary) * (4 + compute)
        layer, head = compute * self.sizes.dequantized, unreduced[0]
        moments = {  # in the order of HELD
            "the forward pass": (0, layer, both, 0, kept, logits),
            "the head": (gradients, 0, root, head, kept, logits),
            "the backward pass": (gradients, layer, gathered, head + unreduced[1], running, 0),
            "the end of the backward pass": (gradients, 0, root, unreduced[2], 0, 0),
        }
        held = {name: dict(zip(HELD, sizes, strict=True)) for name, sizes in moments.items()}
        # on CUDA it updates all parameters at once
        held["the optimizer step"] = {"gradients": share, "optimizer's working memory": share * on_cuda}
        return {name: self.resident | sizes for name, sizes in held.items()}

    def peak(self, tokens: int) -> tuple[str, dict[str, int]]:
        """Return the moment that needs most memory, and the bytes held then."""
        return max(self.moments(tokens).items(), key=lambda moment: sum(moment[1].values()))

    def largest_budget(self, limit: int) -> int:
        """Return the most tokens, in steps of 256, whose peak is within `limit` bytes; 0 if none."""
        budgets = range(256, 2**40, 256)
        return 256 * bisect_right(budgets, limit, key=lambda tokens: sum(self.peak(tokens)[1].values()))
