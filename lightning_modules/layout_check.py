"""The start-up check, which picks the fastest attention, layout and layers that agree with plain rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from app.errors import UserError
from app.method.batch import Layout, OptimizerBatch, PackedRows
from lightning_modules.attention import attentions
from lightning_modules.sharding import gradient_sync

if TYPE_CHECKING:
    from lightning_modules.base import LanguageModelTraining

log = logging.getLogger(__name__)

# Largest mean difference per response token, in nats, that rounding explains. A lost mask changes whole nats.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2}
CHECKED_PAIRS = 4


class Sample(NamedTuple):
    """Pairs for a comparison, with their log-probabilities [CHECKED_PAIRS, sides] from plain rows."""

    batch: OptimizerBatch
    pairs: list[int]
    expected: Tensor
    tokens: Tensor  # of each response, like `expected`


def agreeing_layout(module: LanguageModelTraining, batch: OptimizerBatch) -> Layout:
    """Choose attention and layers of the module's models, and return the layout for training.

    The check compares a few pairs of the batch, and a pair as long as the longest of the run beside a short one.
    Only the long pair reveals models that count positions in a row (a local window) or depend on the longest row
    of a micro-batch (scaled rotary positions). In training, a backward pass is tried on CUDA and for compiled
    layers. Raises UserError if the requested setting disagrees, if not even plain rows agree, or out of memory.
    """
    try:
        with torch.inference_mode(False):  # training uses what a validation has settled
            return _settled(module, batch)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of memory in the start-up check of the model ({_first_line(error)}): lower "
            "data.micro_batch_tokens, or set model.gradient_checkpointing: true; `beta-dpo plan` says what fits."
        ) from error


def _settled(module: LanguageModelTraining, batch: OptimizerBatch) -> Layout:
    samples = [_plain_sample(module, batch), _alone_sample(module, batch.stretched())]
    on_cuda = module.device.type == "cuda"
    warnings: list[str] = []
    for attention, layout in _candidates(module):
        for scorer in module.scorers:
            scorer.use_attention(attention)
        finding = _finding(module, layout, samples, backward=on_cuda)
        if finding is None:
            break
        warnings.append(f"attention {attention} in {layout} rows: {finding}")
    else:
        raise UserError(_refusal(module, warnings[-1], attention, layout))
    if module.trainer.is_global_zero:
        for warning in warnings:
            log.warning("start-up check: %s", warning)
        if warnings and layout == "separate":
            log.warning("model.layout auto: so every response gets a row of its own (slower).")
        elif warnings:
            log.warning("model.attention auto: so attention is %s.", attention)
    compiled = _compile_layers(module, layout, samples)
    if module.trainer.is_global_zero:
        longest = int(samples[1].tokens.max())
        log.info(
            "attention %s, %s rows, layers %s; checked on %d pairs of the data, and on one with a response of %d "
            "tokens, as long as they come, beside a short one%s",
            attention,
            layout,
            "compiled" if compiled else "as they are",
            len(samples[0].pairs),
            longest,
            ", forward and backward" if _tries_backward(module, on_cuda or compiled) else "",
        )
    return layout


def _candidates(module: LanguageModelTraining) -> list[tuple[str, Layout]]:
    """Return the combinations of attention and layout in order of preference."""
    own = module.policy.own_attention
    names = [module.policy.attention]
    if module.attention == "auto":
        names = [*attentions(module.policy.model, module.device, module.compute_dtype), own]
    packed: list[tuple[str, Layout]] = [(name, "packed") for name in names]
    separate: list[tuple[str, Layout]] = [(name, "separate") for name in names]
    if module.requested_layout == "auto":
        return [*packed, separate[-1]]
    return packed if module.requested_layout == "packed" else separate


def _refusal(module: LanguageModelTraining, finding: str, attention: str, layout: Layout) -> str:
    """Return the error message, with a remedy, for a run in which no candidate agrees."""
    if module.requested_layout == "packed":
        return f"model.layout: {finding}; set it to auto or separate."
    if module.attention != "auto":
        return f"model.attention: {finding}; set it to auto."
    rope = getattr(module.policy.model.config, "rope_parameters", None) or {}
    known = rope.get("original_max_position_embeddings", "the length the model was first trained on")
    return (
        f"model.name: {finding}. A row's log-probabilities depend on the other rows of its micro-batch, as with "
        f"rotary positions scaled by the longest row (rope_type {rope.get('rope_type')}): lower data.max_length to "
        f"{known}, or take a model without such scaling."
    )


def _compile_layers(module: LanguageModelTraining, layout: Layout, samples: Sequence[Sample]) -> bool:
    """Compile the layers if that is wanted and works, and return whether they are compiled."""
    if module.compile_layers is False or (module.compile_layers == "auto" and module.device.type != "cuda"):
        return False
    for scorer in module.scorers:
        scorer.compile_layers()
    finding = _finding(module, layout, samples, backward=True)
    if finding is None:
        return True
    if module.compile_layers != "auto":
        raise UserError(f"model.compile_layers: {finding}; set it to auto or false.")
    for scorer in module.scorers:
        scorer.leave_layers()
    if module.trainer.is_global_zero:
        log.warning("start-up check: compiled layers: %s", finding)
        log.warning("model.compile_layers auto: so the layers run as they are (slower).")
    return False


def _finding(
    module: LanguageModelTraining, layout: Layout, samples: Sequence[Sample], backward: bool
) -> str | None:
    """Return what is wrong with attention and layers in this layout on any rank, or None if they agree.

    An exception becomes a finding with its first line; out of memory and UserError are raised.
    """
    backward = _tries_backward(module, backward)
    # as few rows as possible, so that several pairs share a row
    rows = [_rows(module, sample.batch, module.responses, layout, sample.pairs) for sample in samples]
    worst, error = torch.zeros((), dtype=torch.float64), ""
    try:
        for sample, micro_batches in zip(samples, rows, strict=True):
            with torch.set_grad_enabled(backward):
                scores = _score(module, micro_batches)
            apart = ((scores.detach().cpu() - sample.expected).abs() / sample.tokens).nan_to_num(nan=math.inf)
            finite = torch.isfinite(sample.expected)
            worst = torch.maximum(worst, apart.masked_fill(~finite, 0).max())
            if backward and not _has_gradient(module, scores, judge=bool(finite.all())):
                error = "its gradients are not finite"
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as refusal:  # for example another mask format, a missing kernel, or the compiler
        error = f"{type(refusal).__name__}: {_first_line(refusal)}"
    failed, worst = module.reduce(torch.stack([torch.tensor(float(bool(error))).double(), worst]), "max").tolist()
    if failed:
        return error or "it failed on another rank"
    if worst > TOLERANCE[module.compute_dtype]:
        return f"it changes this model's log-probabilities by {worst:.2g} nats per token"
    return None


def _tries_backward(module: LanguageModelTraining, wanted: bool) -> bool:
    return wanted and module.trainer.state.fn == TrainerFn.FITTING


def _has_gradient(module: LanguageModelTraining, scores: Tensor, judge: bool) -> bool:
    """Back-propagate `scores`, drop the gradients, and return whether they are finite (True if not `judge`)."""
    # FSDP2 drops gradients only after their reduction; DDP's buckets must not see these
    with gradient_sync(module.trainer.strategy, module.policy, last=isinstance(module.policy, FSDPModule)):
        scores.sum().backward()
    gradients = [p.grad for p in module.policy.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    finite = not judge or all(bool(torch.isfinite(gradient).all()) for gradient in local)
    module.policy.zero_grad(set_to_none=True)
    return finite


def _plain_sample(module: LanguageModelTraining, batch: OptimizerBatch) -> Sample:
    """Return a few pairs of the batch, scored in plain rows by the model's own head.

    Raises UserError if this project's head differs from it.
    """
    pairs = list(range(min(CHECKED_PAIRS, len(batch.positions))))
    rows = _rows(module, batch, module.responses, "separate", pairs)
    with module.policy.as_loaded(), torch.no_grad():
        expected = _score(module, rows, whole_logits=True).cpu()
        ours = _score(module, rows).cpu()
    sample = Sample(batch, pairs, expected, _response_tokens(rows, expected))
    apart = ((ours - expected).abs() / sample.tokens).nan_to_num(nan=math.inf)
    worst = module.reduce(apart.masked_fill(~torch.isfinite(expected), 0).max(), "max")
    if float(worst) > TOLERANCE[module.compute_dtype]:
        raise UserError(
            f"model.name: the output head of {module.name or 'this architecture'} is not supported: "
            "its log-probabilities differ from those of transformers' own forward pass."
        )
    # a pair that is not finite tests nothing, and would make its packed row NaN
    return sample._replace(pairs=[pair for pair in pairs if torch.isfinite(expected[pair]).all()])


def _alone_sample(module: LanguageModelTraining, batch: OptimizerBatch) -> Sample:
    """Return the pairs of the batch, every response scored in a micro-batch of its own, free of other rows."""
    pairs = list(range(len(batch.positions)))
    expected = torch.zeros(CHECKED_PAIRS, len(module.responses), dtype=torch.float64)
    tokens = torch.ones_like(expected)
    with module.policy.as_loaded(), torch.no_grad():
        for pair in range(2):  # also on ranks without a pair, because forward passes may be collective
            for number, side in enumerate(module.responses):
                for rows in _rows(module, batch, (side,), "separate", pairs[pair : pair + 1]):
                    score = module.policy(rows)
                    if len(rows.response_tokens):
                        expected[pair, number] = float(score)
                        tokens[pair, number] = float(rows.response_tokens)
    return Sample(batch, pairs, expected, tokens)


def _rows(
    module: LanguageModelTraining, batch: OptimizerBatch, sides: Sequence[str], layout: Layout, pairs: list[int]
) -> list[PackedRows]:
    return module.match_ranks(batch.micro_batches(sides, layout, math.inf, pairs))


def _score(module: LanguageModelTraining, rows: Sequence[PackedRows], whole_logits: bool = False) -> Tensor:
    scorer = partial(module.policy, whole_logits=True) if whole_logits else module.policy
    return module.score(scorer, rows, CHECKED_PAIRS)


def _response_tokens(rows: Sequence[PackedRows], like: Tensor) -> Tensor:
    """Return the tokens of every response in the form of `like` [pairs, sides]; 1 for pairs not in the rows."""
    tokens = torch.ones_like(like)
    for micro_batch in rows:
        lengths = micro_batch.response_tokens.view(-1, tokens.shape[1])  # also valid for an empty micro-batch
        tokens = tokens.index_copy(0, micro_batch.pairs.cpu(), lengths.double().cpu())
    return tokens


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
