"""The packed forward pass of a decoder with its head, in slices of the vocabulary: response log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from app.core.errors import UserError
from app.method.batch import Layout, OptimizerBatch, PackedRows
from lightning_modules.attention import OURS, compute_dtype, model_inputs
from lightning_modules.private import attention_of, compile_modules
from lightning_modules.sharding import transformer_blocks

# logits [N tokens, slice of the vocabulary] in memory at a time: a slice should fit the cache of a CPU; a GPU is
# faster with few large products
SLICE_LOGITS = {"cpu": 2**22, "cuda": 2**26}
NARROWEST_SLICE = 512  # below this a matrix product is mostly overhead


class ResponseScorer(nn.Module):
    """The root module that DDP and FSDP2 wrap; it computes log π(y|x) of every response of a micro-batch.

    Backbone and head run in one `forward`, so a sharded head is gathered for its use. Raises UserError for a model
    without a backbone or with another head than a linear layer.
    """

    def __init__(self, model: Any):
        super().__init__()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            cure = "choose another model, or keep adapters and quantize off the head"
            said = f"its output head is a {type(head).__name__}, and only a linear layer is supported"
            raise UserError(f"model.name: {said}: {cure}.")
        if model.base_model is model:
            kind = model.config.model_type
            raise UserError(f"model.name: a {kind} has no backbone without the head: choose another.")
        self.model = model
        self.some_dropped = False  # whether pairs may be dropped between a forward pass and its backward pass
        # in use, by its name in transformers, and as loaded: the fallback and baseline of the start-up check
        self.attention = self.own_attention = attention_of(model.config)
        self.layout: Layout | None = None  # of the rows, known after the start-up check
        self.compiled = False  # whether the layers are
        self.text_config = model.config.get_text_config()  # of the decoder, also in a model of images and text
        self.logit_rule = LogitRule.candidates(self.text_config)[0]  # the start-up check may take another

    def train(self, mode: bool = True) -> ResponseScorer:
        """Set the mode of all modules but experts with jitter, for which the two passes of a step would differ."""
        super().train(mode)
        for module in self.modules():
            if any("jitter" in name and value for name, value in vars(module).items()):
                nn.Module.eval(module)
        return self

    def use_attention(self, name: str) -> None:
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
        """Compile the transformer blocks, with one graph for all row lengths, or undo it."""
        compile_modules(transformer_blocks(self.model), compiled)
        self.compiled = compiled

    @property
    def balanced_row(self) -> float:
        """Return the row length at which attention costs as much per token as the rest of a layer.

        A layer of width d takes about 24·d² operations per token, attention over a row of T tokens 4·d·T: equal at
        T = 6·d. On a CPU, attention with a dense mask has a third of the speed of a matrix product, hence 2·d; on
        CUDA it was not measured. This project's attentions skip what a mask would hide.
        """
        return math.inf if self.attention in OURS else 2.0 * self.text_config.hidden_size

    def pack(
        self, batch: OptimizerBatch, responses: Sequence[str], pairs: Sequence[int] | None = None
    ) -> list[PackedRows]:
        """Return the rows of `pairs` (indices into the share; None: all)."""
        assert self.layout is not None, "the start-up check has not run"
        return batch.micro_batches(responses, self.layout, self.balanced_row, pairs)

    def forward(self, rows: PackedRows, whole_logits: bool = False, hidden_only: bool = False) -> Tensor:
        """Return summed log-probabilities [S] float64, with EOS and without the prompt (method §1).

        With `whole_logits`, for comparison, the model's own head runs on every position. With `hidden_only` return
        the outputs [N, width] that predict the response tokens.
        """
        inputs = {**model_inputs(rows, self.attention, self.text_config), "use_cache": False}
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
        """Return logits [N, V] of outputs [N, width]; FSDP2's root must be gathered."""
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


# --- the head ----------------------------------------------------------------------------------------------------


class LogitRule(NamedTuple):
    """The scale and soft cap that some model families apply to logits."""

    scale: float = 1.0
    cap: float | None = None  # logits become cap·tanh(logits/cap)

    @classmethod
    def candidates(cls, config: Any) -> list[LogitRule]:
        """Return the rules that a Hugging Face configuration may mean, the likeliest first."""

        def setting(*names: str) -> Any:
            return next((value for name in names if (value := getattr(config, name, None))), None)

        scale = setting("logit_scale", "lm_head_multiplier") or 1.0  # Cohere, Falcon H1
        cap = setting("final_logit_softcapping", "logits_soft_cap")  # Gemma 2, RecurrentGemma
        scaling = setting("logits_scaling") or 1.0
        # Granite; Gemma 3 with images, which ignores its cap; HyperCLOVA X
        return [cls(scale / scaling, cap), cls(scale / scaling), cls(scale * scaling, cap)]


def at_least_float32(logits: Tensor) -> Tensor:
    """Return `logits` in float32, or in float64 if they already are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: LogitRule) -> Tensor:
    """Return logits [N, V] of `hidden` [N, width] in float32 (float64 for float64 inputs), without gradient."""
    columns = weight.to(hidden.dtype).t()  # on CUDA, the thread of the backward pass knows no autocast
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        # a GPU accumulates in float32 and can return these sums; elsewhere they are rounded to half precision
        logits = torch.mm(hidden, columns, out_dtype=torch.float32)
    else:
        logits = at_least_float32(hidden @ columns)
    if bias is not None:
        logits += bias
    if rule.scale != 1.0:
        logits.mul_(rule.scale)
    return logits if rule.cap is None else logits.div_(rule.cap).tanh_().mul_(rule.cap)


def head_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rule: LogitRule, dropped: bool = True
) -> Tensor:
    """Return log-probabilities [N] of `targets` [N] in float32 (float64 for float64 weights), with gradient.

    The decoder's outputs `hidden` [N, width] predict the targets; the head has `weight` [V, width] and `bias` [V].
    Both passes hold one slice of logits [N, slice] at a time; the backward pass recomputes them. Slices of the
    vocabulary, unlike slices of the tokens, write every row of the weight's gradient [V, width] once. The backward
    pass skips tokens without a gradient; on a GPU, whose host waits for them, only if pairs may be `dropped`.
    """
    most = SLICE_LOGITS.get(hidden.device.type, SLICE_LOGITS["cuda"])
    width = min(len(weight), max(most // max(len(targets), 1), NARROWEST_SLICE))
    how = rule, width, dropped or not hidden.is_cuda
    return _HeadLogps.apply(hidden.to(compute_dtype(weight)), weight, bias, targets, how)


class _HeadLogps(torch.autograd.Function):
    """`head_logps` for a rule, the width of a slice, and whether to skip tokens without a gradient (`how`)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: Any) -> Tensor:
        rule, width, _ = ctx.how = how
        sums: list[Tensor] = []  # log-sum-exp of each slice, [N] each
        chosen = torch.zeros(len(targets), dtype=at_least_float32(hidden[:0]).dtype, device=hidden.device)
        for start in range(0, len(weight), width):
            logits, place, inside = _slice(hidden, weight, bias, targets, rule, slice(start, start + width))
            chosen = torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), chosen)
            highest = logits.amax(1)
            sums.append(logits.sub_(highest[:, None]).exp_().sum(1).log_().add_(highest))
        normaliser = torch.logsumexp(torch.stack(sums), 0)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        return chosen - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        rule, width, skip = ctx.how
        wanted = torch.nonzero(gradient).squeeze(1) if skip else slice(None)
        d_hidden = torch.zeros_like(hidden, dtype=normaliser.dtype)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        used, scale = hidden[wanted], gradient[wanted, None]
        d_used = d_hidden[wanted]
        for start in range(0, len(weight), width):
            part = slice(start, start + width)
            logits, place, inside = _slice(used, weight, bias, targets[wanted], rule, part)
            slope = None if rule.cap is None else 1 - (logits / rule.cap).square_()
            # d logp/d logits = onehot(target) − softmax
            d_logits = logits.sub_(normaliser[wanted, None]).exp_().mul_(-scale)
            d_logits.scatter_add_(1, place[:, None], scale * inside[:, None])
            if slope is not None:
                d_logits.mul_(slope)
            if rule.scale != 1.0:
                d_logits.mul_(rule.scale)
            if d_bias is not None:
                d_bias[part] = d_logits.sum(0)
            d_logits = d_logits.to(hidden.dtype)
            if d_weight is not None:
                d_weight[part] = d_logits.t() @ used
            d_used += d_logits @ weight[part].to(hidden.dtype)
        d_hidden[wanted] = d_used
        return d_hidden.to(hidden.dtype), d_weight, d_bias, None, None


def _slice(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rule: LogitRule, part: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits [N, slice] of a part of the vocabulary, which the caller may change.

    Also return the index of each target in it, clamped to it, [N], and whether the target lies in it, [N].
    """
    logits = head_logits(hidden, weight[part], None if bias is None else bias[part], rule)
    place = targets - part.start
    inside = (place >= 0) & (place < logits.shape[1])
    return logits, place.clamp(0, logits.shape[1] - 1), inside
