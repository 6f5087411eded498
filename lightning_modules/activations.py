"""Measure the activations that a forward pass keeps for the backward pass, on fake tensors that use no memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.errors import UserError
from lightning_modules.private import FakeTensorMode, storage_id
from lightning_modules.sharding import transformer_blocks
from lightning_modules.tensor_parallel import LOCAL, keep_local_part

SHORT_ROW = 16  # tokens; short, so that the dense mask, which FlexAttention does not need, adds almost nothing


@dataclass(frozen=True)
class Activations:
    """The activation memory of a model, in bytes per token of a micro-batch."""

    all_blocks: float  # kept by all transformer blocks together
    largest_block: float
    outside: float  # embeddings, final norm
    block_input: float  # kept per block under gradient checkpointing; the head's input has the same size
    blocks: int

    def kept(self, checkpointed: bool) -> float:
        """Return the peak in bytes per token.

        The peak is at the start of the backward pass or, with `checkpointed`, while a block is recomputed.
        """
        if checkpointed:
            return self.outside + (self.blocks + 1) * self.block_input + self.largest_block
        return self.outside + self.block_input + self.all_blocks


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
            f"plan: a model of type {config.model_type} cannot be measured without weights: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
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

        def enter(number: int, *_: Any) -> None:
            place[0] = number

        def leave(*_: Any) -> None:
            place[0] = 0

        def count(tensor: Tensor) -> Tensor:
            if storage_id(tensor) not in counted:
                counted.add(storage_id(tensor))
                kept[place[0]] += tensor.untyped_storage().nbytes()
            return tensor

        for number, block in enumerate(blocks, 1):
            block.register_forward_pre_hook(partial(enter, number))
            block.register_forward_hook(leave)
        ids = torch.zeros(rows, SHORT_ROW, dtype=torch.int64)
        mask = torch.ones(rows, 1, SHORT_ROW, SHORT_ROW, dtype=torch.bool)
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            output = model.base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
        del output  # alive until here, so that no new storage reuses the address of a freed one
    return kept
