"""The packed forward pass of a Hugging Face decoder, which returns response log-probabilities, not all logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.core.errors import UserError
from app.method.batch import Layout, OptimizerBatch, PackedRows
from lightning_modules.attention import OURS, model_inputs
from lightning_modules.head import LogitRule, at_least_float32, compute_dtype, head_logits, head_logps
from lightning_modules.private import attention_of, compile_modules
from lightning_modules.sharding import transformer_blocks


class ResponseScorer(nn.Module):
    """The root module that DDP and FSDP2 wrap; it computes log π(y|x) of every response of a micro-batch.

    Backbone and head run in one `forward`, so a sharded head is gathered for its use. The head processes only the
    positions that predict response tokens, one slice of the vocabulary at a time (`head_logps`). Raises UserError
    unless transformers' `model` has a linear layer as head and a backbone separate from it.
    """

    def __init__(self, model: Any):
        super().__init__()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"model.name: its output head is a {type(head).__name__}, and only a linear layer is supported: "
                "choose another model, or keep adapters off the head."
            )
        if model.base_model is model:
            raise UserError(
                f"model.name: a {model.config.model_type} has no backbone without the head: choose another."
            )
        self.model = model
        self.some_dropped = False  # whether pairs may be dropped between a forward pass and its backward pass
        # the one in use, by its name in transformers, and the fallback and baseline of the start-up check
        self.attention = self.own_attention = attention_of(model.config)
        self.layout: Layout | None = None  # of the rows, known after the start-up check
        self.compiled = False  # the layers
        self.logit_rule = LogitRule.of(model.config)

    def use_attention(self, name: str) -> None:
        """Set the attention implementation by its name in transformers."""
        if name != self.attention:  # families with a single implementation warn when it is set
            self.model.set_attn_implementation(name)
            self.attention = attention_of(self.model.config)

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Use the attention that transformers chose at loading, and uncompiled layers, within the block."""
        attention = self.attention
        self.use_attention(self.own_attention)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.use_attention(attention)

    def compile_layers(self, compiled: bool = True) -> None:
        """Compile the transformer blocks by `torch.compile`, with one graph for all row lengths, or undo it."""
        compile_modules(transformer_blocks(self.model), compiled)
        self.compiled = compiled

    @property
    def balanced_row(self) -> float:
        """Return the row length at which attention costs as much per token as the rest of a layer.

        A layer of width d takes about 24·d² operations per token, and attention over a row of T tokens 4·d·T: equal
        at T = 6·d. On a CPU, attention with a dense mask runs at about a third of the speed of a matrix product,
        hence 2·d; the same on CUDA, not measured. This project's attentions skip what a mask would hide.
        """
        return math.inf if self.attention in OURS else 2.0 * self.model.config.hidden_size

    def pack(
        self, batch: OptimizerBatch, responses: Sequence[str], pairs: Sequence[int] | None = None
    ) -> list[PackedRows]:
        """Return rows of `pairs` (indices into the share; None: all), in the layout that this model takes."""
        assert self.layout is not None, "the start-up check has not run"
        return batch.micro_batches(responses, self.layout, self.balanced_row, pairs)

    def forward(self, rows: PackedRows, whole_logits: bool = False, hidden_only: bool = False) -> Tensor:
        """Return summed log-probabilities [S] float64, with EOS and without the prompt (method §1).

        With `whole_logits`, for comparison, the model's own head runs on every position, which is slow and needs
        much memory. With `hidden_only` return the outputs [N, width] that predict the response tokens.
        """
        inputs = {**model_inputs(rows, self.attention, self.model.config), "use_cache": False}
        if whole_logits:
            logits = self.model(**inputs).logits.flatten(0, 1)[rows.predict_index]
            return response_sums(token_logps(logits, rows.target_ids), rows)
        outputs = self.model.base_model(**inputs).last_hidden_state
        hidden = outputs.flatten(0, 1)[rows.predict_index]
        if hidden_only:
            return hidden
        head = self.model.get_output_embeddings()
        per_token = head_logps(hidden, head.weight, head.bias, rows.target_ids, self.logit_rule, self.some_dropped)
        return response_sums(per_token, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [N, V] of outputs [N, width]. Outside `forward`, call `sharding.gather_root` first."""
        head = self.model.get_output_embeddings()
        return head_logits(hidden.to(compute_dtype(head.weight)), head.weight, head.bias, self.logit_rule)


def response_logps(
    scorer: Callable[[PackedRows], Tensor],
    micro_batches: Sequence[PackedRows],
    share: int,
    sides: int,
    device: torch.device | str,
) -> Tensor:
    """Return summed log-probabilities [share, sides] float64 of a rank's pairs; 0 for pairs not in the rows."""
    logps = torch.zeros(share, sides, dtype=torch.float64, device=device)
    for rows in micro_batches:
        logps = logps.index_copy(0, rows.pairs, scorer(rows).view(-1, sides))
    return logps


def response_tokens(
    micro_batches: Sequence[PackedRows], share: int, sides: int, device: torch.device | str
) -> Tensor:
    """Return the number of tokens [share, sides] int64 of a rank's responses; 1 for pairs not in the rows."""
    tokens = torch.ones(share, sides, dtype=torch.int64, device=device)
    for rows in micro_batches:
        tokens[rows.pairs] = rows.response_tokens.view(-1, sides)
    return tokens


def response_sums(per_token: Tensor, rows: PackedRows) -> Tensor:
    """Return the sums [S] float64 of `per_token` [N] over the tokens of each response."""
    # float64, because h is a small difference of large sums
    sums = torch.zeros(len(rows.response_tokens), dtype=torch.float64, device=per_token.device)
    return sums.index_add(0, rows.response_index, per_token.double())


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log-probabilities [N] of `targets` [N] under `logits` [N, V], float32 (float64 for float64 logits)."""
    return -F.cross_entropy(at_least_float32(logits), targets, reduction="none")
