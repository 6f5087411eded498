"""Log-probabilities of response tokens from the head, computed in slices of the vocabulary to save memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Largest number of logits [N tokens, slice of the vocabulary] in memory at a time. On a CPU a slice should fit the
# cache; a GPU is faster with few large products.
SLICE_LOGITS = {"cpu": 2**22, "cuda": 2**26}
NARROWEST_SLICE = 512  # below this a matrix product is mostly overhead


class LogitRule(NamedTuple):
    """The scale and soft cap that some model families apply to logits; the start-up check detects other rules."""

    scale: float = 1.0
    cap: float | None = None  # logits become cap·tanh(logits/cap)

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """Return the rule of a Hugging Face configuration."""
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        divisor = getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(scale / divisor, getattr(config, "final_logit_softcapping", None))  # Gemma 2


def at_least_float32(logits: Tensor) -> Tensor:
    """Return `logits` in float32, or in float64 if they already are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: LogitRule) -> Tensor:
    """Return logits [N, V] of `hidden` [N, width] in float32 (float64 for float64 inputs), without gradient.

    The product is computed in the dtype of `hidden`, not of autocast: on CUDA a backward pass runs in a thread of
    its own, which does not know the dtype of autocast.
    """
    columns = weight.to(hidden.dtype).t()
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
    Both passes hold one slice of logits [N, slice] at a time: the forward pass keeps the log-sum-exp of each slice
    and the backward pass recomputes the slices. Slices of the vocabulary, unlike slices of the tokens, write every
    row of the weight's gradient [V, width] once. The backward pass skips tokens without a gradient, for which a
    GPU's host waits; there it does so only if pairs may be `dropped` after this pass.
    """
    most = SLICE_LOGITS.get(hidden.device.type, SLICE_LOGITS["cuda"])
    width = min(len(weight), max(most // max(len(targets), 1), NARROWEST_SLICE))
    how = rule, width, dropped or not hidden.is_cuda
    return _HeadLogps.apply(hidden.to(compute_dtype(weight)), weight, bias, targets, how)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of products with `weight`: the autocast dtype if autocast is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _HeadLogps(torch.autograd.Function):
    """`head_logps` for a rule, the width of a slice, and whether to skip tokens without a gradient (`how`)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        how: tuple[LogitRule, int, bool],
    ) -> Tensor:
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
    """Return the logits [N, at most width] of a slice of the vocabulary, which the caller may change.

    Also return each target's index in the slice, clamped to it, [N], and whether it lies in the slice, [N].
    """
    logits = head_logits(hidden, weight[part], None if bias is None else bias[part], rule)
    place = targets - part.start
    inside = (place >= 0) & (place < logits.shape[1])
    return logits, place.clamp(0, logits.shape[1] - 1), inside
