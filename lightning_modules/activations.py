"""How much a forward pass keeps for the backward pass, counted on tensors that have shapes and no memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from app.errors import UserError
from lightning_modules.sharding import transformer_blocks
from lightning_modules.tensor_parallel import LOCAL, keep_local_part

SHORT_ROW = 16  # tokens; so short that a mask, which FlexAttention does not have, weighs nothing


@dataclass(frozen=True)
class Activations:
    """Bytes per token of a micro-batch."""

    all_blocks: float  # kept by all transformer blocks together
    largest_block: float
    outside: float  # embeddings, final norm
    block_input: float  # what gradient checkpointing keeps of a block; the head gets as much
    blocks: int

    def kept(self, checkpointed: bool) -> float:
        """Most that is held at a time, when the backward pass begins or, recomputing, goes through a block."""
        if checkpointed:
            return self.outside + (self.blocks + 1) * self.block_input + self.largest_block
        return self.outside + self.block_input + self.all_blocks


def activations(config: Any, dtype: torch.dtype, autocast: bool, split: int = 1) -> Activations:
    """Of the decoder below the head, by running it once on fake tensors.

    `dtype` is that of the weights as the forward pass sees them; `autocast` takes products in bfloat16 all the
    same. Where `split` ranks share every layer (`tensor_parallel`), it is what one of them keeps. Attention counts
    as an implementation that stores no scores (FlexAttention, SDPA).
    Raises UserError for a model that does not run without data.
    """
    try:
        few, many = (_kept(config, dtype, autocast, split, rows) for rows in (1, 9))
    except Exception as error:  # code of any family, on tensors without data
        raise UserError(
            f"plan: a model of type {config.model_type} cannot be measured without weights: "
            f"{(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    # what does not grow with the tokens falls out
    outside, *blocks = [(m - f) / (8 * SHORT_ROW) for m, f in zip(many, few, strict=True)]
    width = config.hidden_size * torch.empty((), dtype=dtype).element_size()
    return Activations(sum(blocks), max(blocks), outside, width, len(blocks))


def _kept(config: Any, dtype: torch.dtype, autocast: bool, split: int, rows: int) -> list[int]:
    """Bytes kept outside of the blocks, then by each block, in the order in which they first appear."""
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        keep_local_part(model, split, LOCAL)
        blocks = transformer_blocks(model)
        counted = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept = [0] * (len(blocks) + 1)
        place = [0]

        def enter(number: int, *_: Any) -> None:
            place[0] = number

        def leave(*_: Any) -> None:
            place[0] = 0

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in counted:
                counted.add(storage._cdata)
                kept[place[0]] += storage.nbytes()
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
        del output  # alive until here, so that no storage took the place of a freed one
    return kept
