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

from app.core.errors import UserError, first_line
from lightning_modules.flex import mask_bytes
from lightning_modules.head import NARROWEST_SLICE, SLICE_LOGITS
from lightning_modules.pretrained import linear_weights
from lightning_modules.private import FakeTensorMode, storage_id
from lightning_modules.sharding import LOCAL, keep_local_part, transformer_blocks
from lightning_modules.strategy import ShardedStrategy

WEIGHT = 4  # bytes of a master weight, of a gradient and of each number of optimizer state: float32
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
    """Measure the decoder without its head by running it on fake tensors.

    `dtype` is the dtype of the weights in the forward pass; with `autocast`, products are in bfloat16. If `split`
    ranks share every layer (`tensor_parallel`), the result is for one rank. Attention is assumed to store no
    scores (FlexAttention, SDPA). Raises UserError for a model that cannot run on fake tensors.
    """
    try:
        few, many = (_kept(config, dtype, autocast, split, rows) for rows in (1, 9))
    except Exception as error:  # the code of a model family may raise anything on fake tensors
        raise UserError(
            f"plan: a model of type {config.model_type} cannot be measured without weights: {first_line(error)}"
        ) from error
    # the difference of two sizes cancels everything that does not grow with the number of tokens
    outside, *blocks = [(m - f) / (8 * SHORT_ROW) for m, f in zip(many, few, strict=True)]
    width = config.hidden_size * torch.empty((), dtype=dtype).element_size()
    return Activations(sum(blocks), max(blocks), outside, width, len(blocks))


def _kept(config: Any, dtype: torch.dtype, autocast: bool, split: int, rows: int) -> list[int]:
    """Return the bytes kept outside the blocks, then by each block in order; shared storage counts once."""
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
    """Return the bytes of a number under bitsandbytes: 8 bits, or 4 with a scale in blocks of 64.

    The scale is float32 or, with `bnb_4bit_use_double_quant`, has 8 bits and a scale of its own in blocks of 256
    (QLoRA, arXiv 2305.14314, §3).
    """
    if not quantize or not quantize.get("load_in_4bit"):
        return 1.0
    return 0.5 + ((1 + 4 / 256) if quantize.get("bnb_4bit_use_double_quant") else 4) / 64


@dataclass(frozen=True)
class Setup:
    """The training settings that affect memory."""

    kind: Literal["single", "ddp", "sharded"]
    device: Literal["cpu", "cuda"] = "cuda"
    strategy: ShardedStrategy | None = None  # if `sharded`
    shards: int = 1  # ranks that share one copy of the model
    compute_bytes: int = 4  # bytes of a number in the forward pass
    autocast: bool = False
    reference: bool = True
    checkpointed: bool = False
    dense_mask: int = 0  # bytes per (query, key) entry of the masks of a transformers attention
    optimizer_state: float = 2.0  # numbers per parameter
    foreach_step: bool = True  # the optimizer updates all parameters at once


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes per device at each moment of a step that may be its peak."""

    sizes: Sizes
    setup: Setup
    activations: Activations

    @property
    def resident(self) -> dict[str, int]:
        """Return the bytes held throughout the step."""
        sizes, setup = self.sizes, self.setup
        state = int(WEIGHT * sizes.trained.all // setup.shards * setup.optimizer_state)
        resident = {"parameters": sizes.stored // setup.shards, "optimizer state": state}
        if setup.reference and not (setup.strategy and setup.strategy.offload_reference):
            halved = sizes.weights.all if setup.strategy else sizes.linear
            reference = setup.compute_bytes * halved + WEIGHT * (sizes.weights.all - halved)
            resident["reference"] = (sizes.stored if sizes.dequantized else reference) // setup.shards
        if setup.autocast:
            resident["bfloat16 copies of autocast"] = 2 * sizes.copied
        return resident

    def logits(self, tokens: int) -> int:
        """Return the head's working memory for `tokens` response tokens: a slice of logits and its gradient."""
        slice_logits = max(SLICE_LOGITS[self.setup.device], NARROWEST_SLICE * tokens)
        return min(slice_logits, tokens * self.sizes.vocabulary) * (4 + self.setup.compute_bytes)

    def moments(self, tokens: int) -> dict[str, dict[str, int]]:
        """Return the bytes held at each candidate for the peak, with micro-batches of `tokens` tokens."""
        weights, trained, setup, made = self.sizes.weights, self.sizes.trained, self.setup, self.activations
        strategy, compute = setup.strategy, setup.compute_bytes
        sharded = strategy is not None
        share = WEIGHT * trained.all // setup.shards
        gradients = share + (WEIGHT * trained.all if setup.kind == "ddp" else 0)  # DDP adds its buckets
        root = blocks = 0  # gathered weights
        if strategy is not None:
            gradients += WEIGHT * trained.all * strategy.accumulate_whole_gradients
            root, block = compute * weights.root, compute * weights.block
            # the running block, the prefetched blocks, and the receive buffer of one block
            blocks = block * (2 + strategy.prefetch_blocks)
            if not strategy.reshard_after_forward:
                blocks = compute * (weights.all - weights.root) + block
        # in the worst case all tokens are in one row
        masks = setup.dense_mask * tokens**2 or mask_bytes(tokens) * (setup.device == "cuda")
        # the peak is at the start of the backward pass or, with checkpoints, while a block is recomputed
        blocks_kept = made.blocks * made.block_input + made.largest_block if setup.checkpointed else made.all_blocks
        kept = int((made.outside + made.block_input + blocks_kept) * tokens) + masks
        working = int(made.largest_block * tokens / 2)  # gradients of the running block's activations
        head_gradient = (compute if sharded else WEIGHT) * trained.head
        layer = compute * self.sizes.dequantized
        moments = {
            "the forward pass": {
                "dequantised layer": layer,
                "gathered weights": (root + blocks) * (2 if setup.reference and sharded else 1),
                "activations": kept,
                "logits": self.logits(tokens),
            },
            "the head": {
                "gradients": gradients,
                "gathered weights": root,
                "gradients not yet reduced": head_gradient,
                "activations": kept,
                "logits": self.logits(tokens),
            },
            "the backward pass": {
                "gradients": gradients,
                "dequantised layer": layer,
                "gathered weights": root + blocks,
                "gradients not yet reduced": head_gradient + (compute + WEIGHT) * trained.block * sharded,
                "activations": kept + working,
            },
            "the end of the backward pass": {
                "gradients": gradients,
                "gathered weights": root,
                "gradients not yet reduced": (compute + WEIGHT) * trained.root * sharded,
            },
            "the optimizer step": {"gradients": share, "optimizer's working memory": share * setup.foreach_step},
        }
        return {name: self.resident | held for name, held in moments.items()}

    def peak(self, tokens: int) -> tuple[str, dict[str, int]]:
        """Return the moment that needs most memory, and the bytes held then."""
        return max(self.moments(tokens).items(), key=lambda moment: sum(moment[1].values()))

    def largest_budget(self, limit: int, step: int = 256) -> int:
        """Return the largest multiple of `step` tokens whose peak is within `limit` bytes; 0 if none is."""
        budgets = range(step, 2**40, step)
        return step * bisect_right(budgets, limit, key=lambda tokens: sum(self.peak(tokens)[1].values()))
