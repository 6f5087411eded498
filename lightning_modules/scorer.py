"""The packed forward: a Hugging Face decoder that returns log-probabilities of responses, never whole logits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.errors import UserError
from app.method.batch import PackedRows
from lightning_modules.attention import OURS, model_inputs
from lightning_modules.head import LogitRule, at_least_float32, head_logits, head_logps
from lightning_modules.sharding import transformer_blocks

RECOMPILE_LIMIT = 64  # graphs of a layer's code that the compiler keeps


class ResponseScorer(nn.Module):
    """log π(y|x) for every response of a micro-batch: the root module that DDP and FSDP2 wrap.

    Backbone and head run in one `forward`, so a sharded head is gathered where it is used. The head sees only
    the positions that predict response tokens, and a slice of the vocabulary at a time (`head_logps`).

    Args:
        model: a causal language model of transformers. Raises UserError when its head is no linear layer, or
            when it has no backbone apart from the head.
        slice_logits: most logits to hold at a time; none chooses by device.
    """

    def __init__(self, model: Any, slice_logits: int | None = None):
        super().__init__()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"model.name: its output head is a {type(head).__name__}, and only a linear layer is supported: "
                "choose another model, or keep adapters off the head."
            )
        if model.base_model is model:
            raise UserError(
                f"model.name: transformers has no backbone without the head for {model.config.model_type} models: "
                "choose another model."
            )
        self.model = model
        self.slice_logits = slice_logits
        # what the model does where pair by pair is not possible, and what the start-up check compares with
        self.own_attention: str = model.config._attn_implementation

    @property
    def attention(self) -> str:
        """The attention implementation in use."""
        return str(self.model.config._attn_implementation)

    def use_attention(self, name: str) -> None:
        """Choose the attention implementation, by its name in transformers."""
        if name != self.attention:  # a family that has but one way warns when it is set
            self.model.set_attn_implementation(name)

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Within the block, the model attends as transformers chose for it, and its layers are not compiled."""
        attention = self.attention
        compiled = [(block, block._compiled_call_impl) for block in self._blocks()]
        self.use_attention(self.own_attention)
        self.leave_layers()
        try:
            yield
        finally:
            self.use_attention(attention)
            for block, call in compiled:
                block._compiled_call_impl = call

    @property
    def compiled(self) -> bool:
        """Whether `torch.compile` runs the layers."""
        return any(block._compiled_call_impl is not None for block in self._blocks())

    def compile_layers(self) -> None:
        """Have `torch.compile` fuse the transformer blocks, once for every length of rows."""
        # gradients or not, training mode, kinds of layers: graphs of one code, of which 8 are kept otherwise
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
        for block in self._blocks():
            block.compile(dynamic=True)

    def leave_layers(self) -> None:
        """Undo `compile_layers`."""
        for block in self._blocks():
            block._compiled_call_impl = None

    def _blocks(self) -> Iterable[nn.Module]:
        return transformer_blocks(self.model)

    @property
    def balanced_row(self) -> float:
        """The row length at which attention costs a token as much as the rest of a layer.

        A layer of width d takes about 24·d² operations a token, attention over a row of T tokens 4·d·T: equal
        at T = 6·d. On a CPU attention under a dense mask runs at about a third of the speed of a matrix product.
        Attentions of our own compute nothing of what the mask would hide: a longer row costs nothing.
        """
        if self.attention in OURS:
            return math.inf
        return 2.0 * self.model.config.hidden_size

    def forward(self, rows: PackedRows, whole_logits: bool = False, hidden_only: bool = False) -> Tensor:
        """Summed log-probabilities [S], float64, EOS included, prompt excluded (method §1).

        `whole_logits` computes them the plain way, with the model's own head on every position: slow and
        large, the yardstick of the start-up check. `hidden_only` stops before the head and returns the outputs
        [N, width] that predict the response tokens.
        """
        inputs = {**model_inputs(rows, self.model.config), "use_cache": False}
        if whole_logits:
            logits = self.model(**inputs).logits.flatten(0, 1)[rows.predict_index]
            return response_sums(token_logps(logits, rows.target_ids), rows)
        outputs = self.model.base_model(**inputs).last_hidden_state
        hidden = outputs.flatten(0, 1)[rows.predict_index]
        if hidden_only:
            return hidden
        per_token = head_logps(hidden, *self._head(), rows.target_ids, self.logit_rule, self.slice_logits)
        return response_sums(per_token, rows)

    @property
    def logit_rule(self) -> LogitRule:
        return LogitRule.of(self.model.config)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head on outputs [N, width]: [N, V]. Outside of `forward`, call `sharding.gather_root` first."""
        return head_logits(hidden, *self._head(), self.logit_rule)

    def _head(self) -> tuple[Tensor, Tensor | None]:
        head = self.model.get_output_embeddings()
        return head.weight, head.bias


def response_sums(per_token: Tensor, rows: PackedRows) -> Tensor:
    """Sums [S] float64 over the tokens of each response, of `per_token` [N]."""
    # float64, because h is a small difference of large sums
    sums = torch.zeros(len(rows.response_tokens), dtype=torch.float64, device=per_token.device)
    return sums.index_add(0, rows.response_index, per_token.double())


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N] of `targets` [N] under `logits` [N, V], in float32, or float64 where the logits are."""
    return -F.cross_entropy(at_least_float32(logits), targets, reduction="none")
